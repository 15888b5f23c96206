// Where frames stand in memory.
//
// A convolution of 3 frames is computed as one of pictures: for every frame, its input has the two frames before it and
// the frame itself side by side as channels ("moments").

#pragma once

#include <ATen/ATen.h>

#include <cstdint>

#include "lanes.h"

namespace fused_vae {

using at::Tensor;

constexpr int64_t MOMENTS = 3;         // frames that a convolution sees
constexpr int64_t KEPT = MOMENTS - 1;  // frames before a chunk, and those that it keeps for the next one
constexpr int64_t MOST_PLACES = 6;     // of a frame: 3 moments, and as many again where it stands for those before it

inline Bf16* bf16(const Tensor& tensor) { return static_cast<Bf16*>(tensor.data_ptr()); }

struct Shape {
    int64_t clips, frames, rows, columns, channels;

    explicit Shape(const Tensor& x)
        : clips(x.size(0)), frames(x.size(1)), rows(x.size(2)), columns(x.size(3)), channels(x.size(4)) {}

    int64_t row() const { return columns * channels; }
    int64_t frame() const { return rows * row(); }
    int64_t clip() const { return frames * frame(); }
    int64_t positions() const { return frames * rows * columns; }
};

// Where one row of a frame stands in the convolution's input and among the kept frames.
struct Places {
    Bf16* starts[MOST_PLACES];
    int64_t strides[MOST_PLACES];  // from one column to the next
    int count = 0;

    void put(int64_t column, int64_t channel, Lanes values) const {
        for (int at = 0; at < count; at++) store(starts[at] + column * strides[at] + channel, values);
    }

    // The gradient of what was put there.
    Lanes sum(int64_t column, int64_t channel) const {
        Lanes total = load(starts[0] + column * strides[0] + channel);
        for (int at = 1; at < count; at++) {
            total = _mm512_add_ps(total, load(starts[at] + column * strides[at] + channel));
        }
        return total;
    }
};

// The convolution's input for one clip, [frame, row, column, moment, channel], and the frames kept for the next chunk,
// [2, row, column, channel]; or the gradients of both. Frames are counted from the first one before the chunk.
struct Layout {
    const Shape& shape;
    Bf16* moments;
    Bf16* kept;  // null: has no gradient
    bool repeats_first;  // the chunk starts the video: its first frame stands for the two before it

    Places places(int64_t frame, int64_t row) const {
        Places found;
        add(found, frame, row);
        if (repeats_first && frame == KEPT) {
            for (int64_t before = 0; before < KEPT; before++) add(found, before, row);
        }
        return found;
    }

  private:
    void add(Places& found, int64_t frame, int64_t row) const {
        for (int64_t moment = 0; moment < MOMENTS; moment++) {
            const int64_t seen_at = frame - moment;
            if (seen_at < 0 || seen_at >= shape.frames) continue;
            Bf16* start = moments + MOMENTS * (seen_at * shape.frame() + row * shape.row()) + moment * shape.channels;
            add(found, start, MOMENTS * shape.channels);
        }
        if (kept != nullptr && frame >= shape.frames) {
            add(found, kept + (frame - shape.frames) * shape.frame() + row * shape.row(), shape.channels);
        }
    }

    static void add(Places& found, Bf16* start, int64_t stride) {
        found.starts[found.count] = start;
        found.strides[found.count++] = stride;
    }
};

// Where to find a scale and a shift, or their gradients, for boxes of positions: tensors [clip, frame, row, column,
// channel] of fewer frames, rows and columns than the activations have.
struct Modulation {
    const Tensor& scale;
    at::IntArrayRef frames;  // for each frame of the activations, the one here
    int64_t box_rows, box_columns;

    Modulation(const Tensor& scale, at::IntArrayRef frames, const Shape& shape)
        : scale(scale), frames(frames), box_rows(shape.rows / scale.size(2)),
          box_columns(shape.columns / scale.size(3)) {
        TORCH_CHECK(static_cast<int64_t>(frames.size()) == shape.frames, "a modulation for each frame");
        TORCH_CHECK(box_rows * scale.size(2) == shape.rows && box_columns * scale.size(3) == shape.columns,
                    "the modulation's rows and columns divide those of the activations");
    }

    int64_t offset(int64_t clip, int64_t frame, int64_t row) const {
        return clip * scale.stride(0) + frames[frame] * scale.stride(1) + (row / box_rows) * scale.stride(2);
    }
};

}  // namespace fused_vae
