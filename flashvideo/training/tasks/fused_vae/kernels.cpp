// What the VAE does between two convolutions, in one pass over memory: norm, modulation by the latent, SiLU, and laying
// the frames out for a convolution over time; and doubling a picture. Forward and backward, for processors with AVX512
// and its bfloat16 instructions.
//
// Activations are bfloat16 [clip, frame, row, column, channel], with a multiple of 16 channels. The weights of norms
// and the modulation are float32; sums are float32 and float64. Each operator runs in one thread.

#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "lanes.h"
#include "layout.h"

namespace {

using namespace fused_vae;
using at::Tensor;

// Norms

struct Sums {  // over a clip, by channel
    std::vector<double> first, second;

    explicit Sums(int64_t channels) : first(channels, 0.0), second(channels, 0.0) {}
};

// Sums of x and of its square; row by row, so that no float32 sum becomes long.
Sums sums_of(const Bf16* x, const Shape& shape) {
    Sums sums(shape.channels);
    for (int64_t row = 0; row < shape.frames * shape.rows; row++, x += shape.row()) {
        for (int64_t channel = 0; channel < shape.channels; channel += LANES) {
            Lanes sum = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
            for (int64_t column = 0; column < shape.columns; column++) {
                const Lanes values = load(x + column * shape.channels + channel);
                sum = _mm512_add_ps(sum, values);
                squares = _mm512_fmadd_ps(values, values, squares);
            }
            add_to(&sums.first[channel], sum);
            add_to(&sums.second[channel], squares);
        }
    }
    return sums;
}

// Writes each channel's mean, and then each channel's 1 / deviation, of its group.
void measure(const Sums& sums, int64_t groups, double count, double epsilon, float* statistics) {
    const int64_t channels = sums.first.size(), width = channels / groups;
    for (int64_t start = 0; start < channels; start += width) {
        double sum = 0.0, squares = 0.0;
        for (int64_t channel = start; channel < start + width; channel++) {
            sum += sums.first[channel];
            squares += sums.second[channel];
        }
        const double mean = sum / count, variance = std::max(0.0, squares / count - mean * mean);
        std::fill_n(statistics + start, width, static_cast<float>(mean));
        std::fill_n(statistics + channels + start, width, static_cast<float>(1.0 / std::sqrt(variance + epsilon)));
    }
}

// A norm as one multiplication and one addition a channel.
struct Affine {
    std::vector<float> scale, shift;

    Affine(const float* statistics, const float* weight, const float* bias, int64_t channels)
        : scale(channels), shift(channels) {
        for (int64_t channel = 0; channel < channels; channel++) {
            scale[channel] = statistics[channels + channel] * weight[channel];
            shift[channel] = bias[channel] - statistics[channel] * scale[channel];
        }
    }
};

// Forward

void activate_row(const Bf16* x, const Shape& shape, const Affine& norm, const float* scale, const float* shift,
                  int64_t box, const Places& places) {
    for (int64_t column = 0; column < shape.columns; column++) {
        const int64_t at = (column / box) * shape.channels;
        for (int64_t channel = 0; channel < shape.channels; channel += LANES) {
            const Lanes values = load(x + column * shape.channels + channel);
            const Lanes normed = _mm512_fmadd_ps(values, load(&norm.scale[channel]), load(&norm.shift[channel]));
            const Lanes moved = _mm512_fmadd_ps(normed, load(scale + at + channel), load(shift + at + channel));
            places.put(column, channel, _mm512_mul_ps(moved, sigmoid(moved)));
        }
    }
}

void copy_before(const Bf16* before, const Layout& layout) {
    const Shape& shape = layout.shape;
    for (int64_t frame = 0; frame < KEPT; frame++) {
        for (int64_t row = 0; row < shape.rows; row++, before += shape.row()) {
            const Places places = layout.places(frame, row);
            for (int64_t column = 0; column < shape.columns; column++) {
                for (int64_t channel = 0; channel < shape.channels; channel += LANES) {
                    places.put(column, channel, load(before + column * shape.channels + channel));
                }
            }
        }
    }
}

void check(const Tensor& x, const Tensor& scale, const Tensor& shift, int64_t groups) {
    TORCH_CHECK(x.dim() == 5 && x.is_contiguous() && x.scalar_type() == at::kBFloat16, "x: contiguous bfloat16 [5]");
    TORCH_CHECK(x.size(4) % LANES == 0 && x.size(4) % groups == 0, "channels: a multiple of 16 and of the groups");
    for (const Tensor* each : {&scale, &shift}) {
        TORCH_CHECK(each->is_contiguous() && each->scalar_type() == at::kFloat, "modulation: contiguous float32");
        TORCH_CHECK(each->sizes() == scale.sizes() && each->size(4) == x.size(4), "modulation: as many channels as x");
    }
}

// -> the convolution's input [clip * frame, row, column, 3 * channel], the kept frames [clip, 2, row, column, channel],
// and for the backward pass the norm's statistics [clip, 2, channel]. `before`: the kept frames of the chunk before, or
// nothing in a video's first chunk. `frames`: for each frame of x the modulation's.
std::tuple<Tensor, Tensor, Tensor> norm_silu_stack(
    const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t groups, double epsilon, const Tensor& scale,
    const Tensor& shift, at::IntArrayRef frames, const std::optional<Tensor>& before) {
    check(x, scale, shift, groups);
    const Shape shape(x);
    const Modulation modulation(scale, frames, shape);
    TORCH_CHECK(!before || (before->is_contiguous() && before->scalar_type() == at::kBFloat16 &&
                            before->numel() == KEPT * shape.clips * shape.frame()),
                "before: contiguous bfloat16, two frames of each clip");
    const double count = static_cast<double>(shape.positions()) * (shape.channels / groups);
    const Tensor moments = at::empty(
        {shape.clips * shape.frames, shape.rows, shape.columns, MOMENTS * shape.channels}, x.options());
    const Tensor kept = at::empty({shape.clips, KEPT, shape.rows, shape.columns, shape.channels}, x.options());
    const Tensor statistics = at::empty({shape.clips, 2, shape.channels}, weight.options());
    for (int64_t clip = 0; clip < shape.clips; clip++) {
        const Bf16* pixels = bf16(x) + clip * shape.clip();
        float* measured = statistics.data_ptr<float>() + clip * 2 * shape.channels;
        measure(sums_of(pixels, shape), groups, count, epsilon, measured);
        const Affine norm(measured, weight.data_ptr<float>(), bias.data_ptr<float>(), shape.channels);
        const Layout layout{shape, bf16(moments) + clip * MOMENTS * shape.clip(),
                            bf16(kept) + clip * KEPT * shape.frame(), !before.has_value()};
        for (int64_t frame = 0; frame < shape.frames; frame++) {
            for (int64_t row = 0; row < shape.rows; row++, pixels += shape.row()) {
                const int64_t at = modulation.offset(clip, frame, row);
                activate_row(pixels, shape, norm, scale.data_ptr<float>() + at, shift.data_ptr<float>() + at,
                             modulation.box_columns, layout.places(frame + KEPT, row));
            }
        }
        if (before.has_value()) copy_before(bf16(*before) + clip * KEPT * shape.frame(), layout);
    }
    return {moments, kept, statistics};
}

// Backward

struct RowGradients {  // of a row's modulation, and the norm's
    float *scale, *shift;
    Sums& sums;  // of the gradient behind the norm, and of its product with x
};

// Writes the gradient behind the norm to `out`, and adds to the others.
void activate_row_backward(const Bf16* x, const Shape& shape, const Affine& norm, const float* scale,
                           const float* shift, int64_t box, const Places& places, Bf16* out, RowGradients& gradients) {
    const Lanes one = _mm512_set1_ps(1.0f), zero = _mm512_setzero_ps();
    for (int64_t channel = 0; channel < shape.channels; channel += LANES) {
        const Lanes norm_scale = load(&norm.scale[channel]), norm_shift = load(&norm.shift[channel]);
        Lanes sum = zero, products = zero;
        for (int64_t start = 0; start < shape.columns; start += box) {
            const int64_t at = (start / box) * shape.channels + channel;
            const Lanes box_scale = load(scale + at), box_shift = load(shift + at);
            Lanes scale_sum = zero, shift_sum = zero;
            for (int64_t column = start; column < start + box; column++) {
                const int64_t here = column * shape.channels + channel;
                const Lanes values = load(x + here);
                const Lanes normed = _mm512_fmadd_ps(values, norm_scale, norm_shift);
                const Lanes moved = _mm512_fmadd_ps(normed, box_scale, box_shift);
                const Lanes gate = sigmoid(moved);
                const Lanes slope = _mm512_mul_ps(gate, _mm512_fmadd_ps(moved, _mm512_sub_ps(one, gate), one));
                const Lanes gradient = _mm512_mul_ps(places.sum(column, channel), slope);
                shift_sum = _mm512_add_ps(shift_sum, gradient);
                scale_sum = _mm512_fmadd_ps(gradient, normed, scale_sum);
                const Lanes behind_norm = _mm512_mul_ps(gradient, box_scale);
                sum = _mm512_add_ps(sum, behind_norm);
                products = _mm512_fmadd_ps(behind_norm, values, products);
                store(out + here, behind_norm);
            }
            add_to(gradients.scale + at, scale_sum);
            add_to(gradients.shift + at, shift_sum);
        }
        add_to(&gradients.sums.first[channel], sum);
        add_to(&gradients.sums.second[channel], products);
    }
}

// Turns the gradient behind the norm, in `gradient`, into that of its input x, and adds to those of its weights.
void norm_backward(const Bf16* x, const Shape& shape, const Sums& sums, const float* statistics, const float* weight,
                   int64_t groups, Bf16* gradient, float* weight_gradient, float* bias_gradient) {
    const int64_t width = shape.channels / groups;
    const double count = static_cast<double>(shape.positions()) * width;
    std::vector<float> from_gradient(shape.channels), from_x(shape.channels), constant(shape.channels);
    for (int64_t start = 0; start < shape.channels; start += width) {
        const double mean = statistics[start], inverse = statistics[shape.channels + start];
        double sum = 0.0, products = 0.0;  // of the gradient by the normed x, and with it
        for (int64_t channel = start; channel < start + width; channel++) {
            const double product = (sums.second[channel] - mean * sums.first[channel]) * inverse;
            weight_gradient[channel] += product;
            bias_gradient[channel] += sums.first[channel];
            sum += sums.first[channel] * weight[channel];
            products += product * weight[channel];
        }
        for (int64_t channel = start; channel < start + width; channel++) {
            from_gradient[channel] = inverse * weight[channel];
            from_x[channel] = -inverse * inverse * products / count;
            constant[channel] = (inverse * products * mean - sum) * inverse / count;
        }
    }
    for (int64_t position = 0; position < shape.positions(); position++) {
        for (int64_t channel = 0; channel < shape.channels; channel += LANES, x += LANES, gradient += LANES) {
            const Lanes rest = _mm512_fmadd_ps(load(x), load(&from_x[channel]), load(&constant[channel]));
            store(gradient, _mm512_fmadd_ps(load(gradient), load(&from_gradient[channel]), rest));
        }
    }
}

void copy_before_backward(const Layout& layout, Bf16* before) {
    const Shape& shape = layout.shape;
    for (int64_t frame = 0; frame < KEPT; frame++) {
        for (int64_t row = 0; row < shape.rows; row++, before += shape.row()) {
            const Places places = layout.places(frame, row);
            for (int64_t column = 0; column < shape.columns; column++) {
                for (int64_t channel = 0; channel < shape.channels; channel += LANES) {
                    store(before + column * shape.channels + channel, places.sum(column, channel));
                }
            }
        }
    }
}

// The gradients of x, weight, bias, scale, shift and, if `has_before`, before (else an empty tensor).
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> norm_silu_stack_backward(
    const Tensor& moments_gradient, const std::optional<Tensor>& kept_gradient, const Tensor& x,
    const Tensor& statistics, const Tensor& weight, const Tensor& bias, int64_t groups, const Tensor& scale,
    const Tensor& shift, at::IntArrayRef frames, bool has_before) {
    check(x, scale, shift, groups);
    const Shape shape(x);
    const Modulation modulation(scale, frames, shape);
    const Tensor x_gradient = at::empty_like(x), before_gradient = at::empty(
        {has_before ? shape.clips : 0, KEPT, shape.rows, shape.columns, shape.channels}, x.options());
    const Tensor weight_gradient = at::zeros_like(weight), bias_gradient = at::zeros_like(bias);
    const Tensor scale_gradient = at::zeros_like(scale), shift_gradient = at::zeros_like(shift);
    for (int64_t clip = 0; clip < shape.clips; clip++) {
        const Bf16* pixels = bf16(x) + clip * shape.clip();
        Bf16* out = bf16(x_gradient) + clip * shape.clip();
        const float* measured = statistics.data_ptr<float>() + clip * 2 * shape.channels;
        const Affine norm(measured, weight.data_ptr<float>(), bias.data_ptr<float>(), shape.channels);
        const Layout layout{shape, bf16(moments_gradient) + clip * MOMENTS * shape.clip(),
                            kept_gradient ? bf16(*kept_gradient) + clip * KEPT * shape.frame() : nullptr, !has_before};
        Sums sums(shape.channels);
        for (int64_t frame = 0; frame < shape.frames; frame++) {
            for (int64_t row = 0; row < shape.rows; row++) {
                const int64_t at = modulation.offset(clip, frame, row);
                const int64_t here = frame * shape.frame() + row * shape.row();
                RowGradients gradients{
                    scale_gradient.data_ptr<float>() + at, shift_gradient.data_ptr<float>() + at, sums};
                activate_row_backward(pixels + here, shape, norm, scale.data_ptr<float>() + at,
                                      shift.data_ptr<float>() + at, modulation.box_columns,
                                      layout.places(frame + KEPT, row), out + here, gradients);
            }
        }
        norm_backward(pixels, shape, sums, measured, weight.data_ptr<float>(), groups, out,
                      weight_gradient.data_ptr<float>(), bias_gradient.data_ptr<float>());
        if (has_before) copy_before_backward(layout, bf16(before_gradient) + clip * KEPT * shape.frame());
    }
    return {x_gradient, weight_gradient, bias_gradient, scale_gradient, shift_gradient, before_gradient};
}

// Doubling

// Pictures [picture, row, column, channel] with every pixel repeated in 2 rows and 2 columns.
Tensor doubled(const Tensor& x) {
    const int64_t pictures = x.size(0), rows = x.size(1), columns = x.size(2), channels = x.size(3);
    const Tensor out = at::empty({pictures, 2 * rows, 2 * columns, channels}, x.options());
    const Bf16* from = bf16(x);
    Bf16* to = bf16(out);
    const int64_t next_row = 2 * columns * channels;
    for (int64_t row = 0; row < pictures * rows; row++, to += next_row) {
        for (int64_t column = 0; column < columns; column++, to += channels) {
            for (int64_t channel = 0; channel < channels; channel += LANES, from += LANES, to += LANES) {
                const Lanes values = load(from);
                for (const int64_t at : {int64_t{0}, channels, next_row, next_row + channels}) store(to + at, values);
            }
        }
    }
    return out;
}

// The gradient of `doubled`: the sum of each pixel's four.
Tensor doubled_backward(const Tensor& gradient) {
    const int64_t pictures = gradient.size(0), rows = gradient.size(1) / 2, columns = gradient.size(2) / 2;
    const int64_t channels = gradient.size(3), next_row = 2 * columns * channels;
    const Tensor out = at::empty({pictures, rows, columns, channels}, gradient.options());
    const Bf16* from = bf16(gradient);
    Bf16* to = bf16(out);
    for (int64_t row = 0; row < pictures * rows; row++, from += next_row) {
        for (int64_t column = 0; column < columns; column++, from += channels) {
            for (int64_t channel = 0; channel < channels; channel += LANES, from += LANES, to += LANES) {
                const Lanes upper = _mm512_add_ps(load(from), load(from + channels));
                const Lanes lower = _mm512_add_ps(load(from + next_row), load(from + next_row + channels));
                store(to, _mm512_add_ps(upper, lower));
            }
        }
    }
    return out;
}

}  // namespace

TORCH_LIBRARY(flashvideo_vae, library) {
    library.def(
        "norm_silu_stack(Tensor x, Tensor weight, Tensor bias, int groups, float epsilon, Tensor scale, Tensor shift, "
        "int[] frames, Tensor? before) -> (Tensor, Tensor, Tensor)", &norm_silu_stack);
    library.def(
        "norm_silu_stack_backward(Tensor moments_gradient, Tensor? kept_gradient, Tensor x, Tensor statistics, "
        "Tensor weight, Tensor bias, int groups, Tensor scale, Tensor shift, int[] frames, bool has_before) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)", &norm_silu_stack_backward);
    library.def("doubled(Tensor x) -> Tensor", &doubled);
    library.def("doubled_backward(Tensor gradient) -> Tensor", &doubled_backward);
}
