// Two clips on top of each other with a line between them. Knows the browser, and nothing of ComfyUI.

import { CompareClip } from "./compare_clip.js";
import { STYLE } from "./compare_style.js";
import { CompareView } from "./compare_view.js";

const HELD = 350; // milliseconds from which a key counts as held, and not as pressed
const WHEEL = 0.0015, LINE_PIXELS = 16; // of zoom for each pixel that a wheel turns
const STEP = 0.05, ZOOM_STEP = 1.25; // of the keys
const SHARP = 3; // screen pixels for one of the picture, from where on its pixels are shown as squares
const MAX_STAGE = 4096; // pixels of a side that are drawn
const SIDES = { a: "before", b: "after" };

/** An element of the page with text and properties, but never with HTML. */
function made(tag, className, properties = {}, attributes = {}) {
  const element = Object.assign(document.createElement(tag), { className, ...properties });
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

export class CompareSlider {
  /** `urlOf(file)` gives the address of a result's file, `words` the texts, `onWheel(event)` gets what isn't ours. */
  constructor({ urlOf, words, onWheel }) {
    Object.assign(this, { urlOf, words, onWheel });
    this.results = [];
    this.index = 0;
    this.clip = null;
    this.side = null; // "before" or "after" if only one is shown
    this.playing = !window.matchMedia?.("(prefers-reduced-motion: reduce)").matches;
    this.visible = true;
    this.view = new CompareView();
    this.build();
    this.listen();
  }

  build() {
    const { words } = this;
    this.element = made("div", "flashvideo-compare", {}, { "data-capture-wheel": "true" });
    const root = this.element.attachShadow({ mode: "open" });
    this.canvas = made("canvas", "");
    this.line = made("div", "line", { tabIndex: 0 }, {
      role: "slider", "aria-label": words.line, "aria-valuemin": 0, "aria-valuemax": 100,
    });
    this.names = {
      before: made("span", "name before", { textContent: words.before }),
      after: made("span", "name after", { textContent: words.after }),
    };
    this.message = made("div", "message", { hidden: true }, { role: "status" });
    this.stage = made("div", "stage");
    this.stage.append(this.canvas, this.line, ...Object.values(this.names), this.message);
    this.playButton = made("button", "play", { type: "button" });
    this.time = made("input", "time", { type: "range", min: 0, step: 1, value: 0 }, { "aria-label": words.frame });
    this.space = made("span", "space");
    this.count = made("span", "count");
    this.flipButton = made("button", "flip", { type: "button", title: words.flip }, { "aria-label": words.flip });
    this.previousButton = made("button", "previous", { type: "button", textContent: "‹", title: words.previous });
    this.number = made("span", "count number");
    this.nextButton = made("button", "next", { type: "button", textContent: "›", title: words.next });
    const bar = made("div", "bar", { title: words.help });
    bar.append(
      this.playButton, this.time, this.space, this.count, this.flipButton,
      this.previousButton, this.number, this.nextButton,
    );
    this.root = made("div", "slider", { tabIndex: 0 }, {
      role: "group", "aria-label": `${words.before} / ${words.after}. ${words.help}`,
    });
    this.root.append(this.stage, bar);
    root.append(made("style", "", { textContent: STYLE }), this.root);
  }

  listen() {
    const on = (target, kinds, action) => {
      for (const kind of kinds.split(" ")) target.addEventListener(kind, action, { passive: false });
    };
    on(this.stage, "pointerdown", (event) => this.press(event));
    on(this.stage, "pointermove", (event) => this.move(event));
    on(this.stage, "pointerup pointercancel", (event) => this.release(event));
    on(this.root, "pointerleave", () => this.giveFocusBack());
    on(this.stage, "dblclick", () => this.reset());
    on(this.stage, "wheel", (event) => this.wheel(event));
    // The node below must not be dragged, opened or renamed; other buttons than the first are the page's.
    on(this.root, "pointerdown pointerup mousedown mouseup click dblclick", (event) => {
      if (event.button === 0) event.stopPropagation();
    });
    on(this.root, "pointermove mousemove", (event) => {
      if ((event.buttons & ~1) === 0) event.stopPropagation();
    });
    on(this.root, "keydown", (event) => this.keyDown(event));
    on(this.root, "keyup", (event) => this.keyUp(event));
    on(this.playButton, "click", () => this.togglePlay());
    on(this.flipButton, "click", () => this.showSide({ null: "before", before: "after", after: null }[this.side]));
    on(this.time, "input", () => this.seek(Number(this.time.value)));
    on(this.previousButton, "click", () => this.open(this.index - 1));
    on(this.nextButton, "click", () => this.open(this.index + 1));
    this.resized = new ResizeObserver(() => this.draw());
    this.resized.observe(this.stage);
    this.watched = new IntersectionObserver((entries) => {
      this.visible = entries.at(-1).isIntersecting;
      this.followPlaying();
      this.draw();
    });
    this.watched.observe(this.element);
  }

  /** Show a run's results, one at a time; none clears the slider. The same once more changes nothing. */
  show(results) {
    if (JSON.stringify(results) === JSON.stringify(this.results)) return;
    this.results = results;
    this.open(Math.min(this.index, Math.max(0, results.length - 1)));
  }

  open(index) {
    const before = this.clip;
    before?.close();
    this.clip = null;
    const result = this.results[(index + this.results.length) % this.results.length];
    this.message.hidden = true;
    if (!result) return this.draw();
    this.index = this.results.indexOf(result);
    if (before && (before.result.width !== result.width || before.result.height !== result.height)) this.view.reset();
    const clip = new CompareClip(result, this.urlOf(result.file), () => this.draw(), () => this.fail(clip));
    this.clip = clip;
    this.playButton.hidden = this.time.hidden = this.count.hidden = !clip.isVideo;
    this.space.hidden = clip.isVideo;
    this.time.max = result.frames - 1;
    this.count.title = result.total > result.frames
      ? this.words.cut.replace("{frames}", result.frames).replace("{total}", result.total) : "";
    this.number.textContent = `${this.index + 1}/${this.results.length}`;
    for (const each of [this.previousButton, this.number, this.nextButton]) each.hidden = this.results.length < 2;
    this.followPlaying();
    this.draw();
  }

  fail(clip) {
    if (clip !== this.clip) return;
    this.message.textContent = this.words.gone;
    this.message.hidden = false;
  }

  destroy() {
    this.clip?.close();
    this.clip = null;
    this.results = [];
    this.resized.disconnect();
    this.watched.disconnect();
    this.element.remove();
  }

  togglePlay() {
    this.playing = !this.playing;
    this.followPlaying();
    this.draw();
  }

  /** Play if that is wanted and anybody can see it. */
  followPlaying() {
    if (this.playing && this.visible) this.clip?.play();
    else this.clip?.pause();
  }

  seek(frame) {
    this.playing = false;
    this.followPlaying();
    this.clip?.seek(frame);
    this.draw();
  }

  step(frames) {
    if (!this.clip) return;
    const from = this.playing ? this.clip.frame : this.clip.wanted ?? this.clip.frame;
    this.seek(from + frames);
  }

  showSide(side) {
    this.side = side;
    this.draw();
  }

  reset() {
    this.view.reset();
    this.side = null;
    this.draw();
  }

  draw() {
    const { clip, view, canvas } = this;
    const still = !clip?.ready;
    const line = { before: 1, after: 0 }[this.side] ?? view.line;
    this.showState(line, still);
    const box = canvas.getBoundingClientRect();
    if (!box.width || !box.height) return;
    // As many pixels as the screen has there, also in a graph that is zoomed.
    const ratio = Math.min(window.devicePixelRatio || 1, MAX_STAGE / Math.max(box.width, box.height));
    const width = Math.round(box.width * ratio), height = Math.round(box.height * ratio);
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
    const context = canvas.getContext("2d");
    context.clearRect(0, 0, width, height);
    if (still) return;
    const place = view.place({ width, height }, clip.result);
    context.imageSmoothingEnabled = place.scale < SHARP;
    context.imageSmoothingQuality = "medium";
    const edge = Math.round(line * width);
    this.drawHalf(context, place, 0, 0, edge, height);
    this.drawHalf(context, place, clip.result.offset, edge, width, height);
  }

  /** The half of the copy that begins at a row, between two columns of the stage. */
  drawHalf(context, place, row, from, to, height) {
    if (to <= from) return;
    const { result, copy } = this.clip;
    context.save();
    context.beginPath();
    context.rect(from, 0, to - from, height);
    context.clip();
    const { left, top } = place;
    context.drawImage(copy, 0, row, result.width, result.height, left, top, place.width, place.height);
    context.restore();
  }

  /** What is said around the picture. */
  showState(line, still) {
    const { clip, words } = this;
    this.line.hidden = still || this.side !== null;
    this.line.style.left = `${line * 100}%`;
    this.line.setAttribute("aria-valuenow", Math.round(line * 100));
    this.names.before.hidden = still || this.side === "after";
    this.names.after.hidden = still || this.side === "before";
    this.stage.classList.toggle("zoomed", this.view.zoom > 1);
    const play = this.playing ? words.pause : words.play;
    this.playButton.textContent = this.playing ? "❚❚" : "▶";
    this.playButton.title = play;
    this.playButton.setAttribute("aria-label", play);
    this.flipButton.textContent = { before: "A", after: "B" }[this.side] ?? "A|B";
    if (!clip) return;
    const { frames, total } = clip.result;
    this.time.value = clip.frame;
    this.count.textContent = `${clip.frame + 1}/${frames}${total > frames ? "…" : ""}`;
    this.element.dataset.frame = clip.ready ? clip.frame : "";
  }

  /** A pointer's place in the stage, in pixels as drawn. */
  point(event) {
    const box = this.canvas.getBoundingClientRect();
    return {
      x: (event.clientX - box.left) / box.width * this.canvas.width,
      y: (event.clientY - box.top) / box.height * this.canvas.height,
    };
  }

  moveLine(event) {
    this.view.moveLine(this.point(event).x / this.canvas.width);
    this.draw();
  }

  press(event) {
    if (event.button !== 0) return;
    this.root.focus({ preventScroll: true });
    this.focusTaken = false;
    this.stage.setPointerCapture(event.pointerId);
    // The line is always below a mouse, so that only a finger can mean it.
    const onLine = event.target === this.line && event.pointerType !== "mouse";
    this.drag = { id: event.pointerId, at: this.point(event), pan: this.view.zoom > 1 && !onLine };
    this.stage.classList.toggle("panning", this.drag.pan);
    if (!this.drag.pan) this.moveLine(event);
    event.preventDefault();
  }

  move(event) {
    if (this.drag && this.drag.id !== event.pointerId) return;
    if (this.drag?.pan) {
      const at = this.point(event);
      this.view.pan(at.x - this.drag.at.x, at.y - this.drag.at.y, this.canvas, this.clip?.result ?? this.canvas);
      this.drag.at = at;
      this.draw();
    } else if (this.drag || (event.pointerType === "mouse" && event.buttons === 0)) {
      this.moveLine(event);
      // A graph that scrolls by below a resting pointer moves nothing: that must not take the keys and the wheel.
      if (!this.drag && (event.movementX || event.movementY)) this.takeFocus();
    }
  }

  release(event) {
    if (this.drag?.id !== event.pointerId) return;
    this.drag = null;
    this.stage.classList.remove("panning");
  }

  /** Keys and wheel are for the slider while the pointer moves on it, unless somebody types elsewhere. */
  takeFocus() {
    const active = document.activeElement;
    if (active === this.element || active?.matches?.("input, textarea, select, [contenteditable]")) return;
    this.focusTaken = true;
    this.focusBefore = active;
    this.root.focus({ preventScroll: true });
  }

  giveFocusBack() {
    if (!this.focusTaken || this.drag) return;
    this.focusTaken = false;
    this.root.blur();
    if (this.focusBefore !== document.body) this.focusBefore?.focus?.({ preventScroll: true });
    this.focusBefore = null;
  }

  wheel(event) {
    if (document.activeElement !== this.element || !this.clip) return this.onWheel?.(event);
    event.preventDefault();
    event.stopPropagation();
    const turned = event.deltaY * (event.deltaMode === WheelEvent.DOM_DELTA_LINE ? LINE_PIXELS : 1);
    this.view.zoomAt(Math.exp(-turned * WHEEL), this.point(event), this.canvas, this.clip.result);
    this.draw();
  }

  keyDown(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    const action = this.actionOf(key, event);
    if (!action) return;
    event.preventDefault();
    event.stopPropagation(); // else the page's own keys would act, too
    action();
  }

  actionOf(key, event) {
    const { target } = event;
    const middle = { x: this.canvas.width / 2, y: this.canvas.height / 2 };
    const zoom = (factor) => () => {
      if (this.clip) this.view.zoomAt(factor, middle, this.canvas, this.clip.result);
      this.draw();
    };
    const arrow = (sign) => () => {
      if (event.shiftKey || target === this.line) this.shift(sign, 0);
      else this.step(sign);
    };
    const actions = {
      a: () => this.keySide("a", event.repeat),
      b: () => this.keySide("b", event.repeat),
      "+": zoom(ZOOM_STEP),
      "=": zoom(ZOOM_STEP),
      "-": zoom(1 / ZOOM_STEP),
      0: () => this.reset(),
      ...(target instanceof HTMLButtonElement ? {} : { " ": () => this.clip?.isVideo && this.togglePlay() }),
    };
    const arrows = {
      ArrowLeft: arrow(-1),
      ArrowRight: arrow(1),
      ArrowUp: () => this.shift(0, -1),
      ArrowDown: () => this.shift(0, 1),
    };
    return actions[key] ?? (target === this.time ? undefined : arrows[key]); // which has arrows of its own
  }

  /** Move the line, or what a zoomed stage shows. */
  shift(right, down) {
    const { view, canvas } = this;
    if (view.zoom === 1 || this.root.getRootNode().activeElement === this.line) {
      view.moveLine(view.line + right * STEP);
    } else if (this.clip) {
      view.pan(-right * STEP * canvas.width, -down * STEP * canvas.height, canvas, this.clip.result);
    }
    this.draw();
  }

  /** A key of a side: pressed, it shows that side until it is pressed again; held, as long as it is held. */
  keySide(key, repeated) {
    if (repeated) return;
    this.held = { key, since: performance.now(), before: this.side };
    this.showSide(this.side === SIDES[key] ? null : SIDES[key]);
  }

  keyUp(event) {
    const { held } = this;
    if (held?.key !== event.key.toLowerCase()) return;
    event.stopPropagation();
    this.held = null;
    if (performance.now() - held.since >= HELD) this.showSide(held.before);
  }
}
