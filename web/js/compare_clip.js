// A preview from the server: a video or a picture that holds before on top and after below. Whatever the browser does
// meanwhile, each frame is copied once, and both halves are drawn from the copy: they always show the same moment.

const LATE = 150; // milliseconds after a seek in which a browser reports the new frame

export class CompareClip {
  /** `onFrame()` is called when another frame is there, `onError()` when there will be none. */
  constructor(result, url, onFrame, onError) {
    this.result = result;
    this.frame = 0;
    this.ready = false;
    this.copy = document.createElement("canvas");
    this.onFrame = onFrame;
    this.stopped = new AbortController();
    const still = result.frames <= 1;
    this.source = document.createElement(still ? "img" : "video");
    this.source.addEventListener("error", () => onError(), { signal: this.stopped.signal });
    if (still) {
      this.source.addEventListener("load", () => this.grab(0), { signal: this.stopped.signal });
    } else {
      this.prepare(this.source);
    }
    this.source.src = url;
  }

  get isVideo() {
    return this.source instanceof HTMLVideoElement;
  }

  get paused() {
    return !this.isVideo || this.source.paused;
  }

  play() {
    // Refused where the browser allows no playback, and interrupted when the clip is closed at once.
    if (!this.isVideo) return;
    this.source.loop = true;
    this.source.play().catch(() => {});
  }

  pause() {
    if (!this.isVideo) return;
    this.source.pause();
    this.source.loop = false; // else a seek to the last frame may end at the first
  }

  /** Show a frame, in its middle, where rounding can't hit a neighbour. */
  seek(frame) {
    if (!this.isVideo) return;
    const last = this.result.frames - 1;
    this.wanted = Math.min(Math.max(frame, 0), last);
    this.source.currentTime = (this.wanted + 0.5) / this.result.fps;
  }

  close() {
    this.stopped.abort();
    clearTimeout(this.timer);
    cancelAnimationFrame(this.tick);
    if (this.isVideo) {
      this.source.cancelVideoFrameCallback?.(this.callback);
      this.source.pause();
    }
    this.source.removeAttribute("src");
    if (this.isVideo) this.source.load(); // lets go of the file and of the decoder
    this.copy.width = this.copy.height = 0;
  }

  prepare(video) {
    const { signal } = this.stopped;
    Object.assign(video, { muted: true, playsInline: true, preload: "auto" });
    const frameAt = (time) => Math.floor(time * this.result.fps + 1e-3);
    if (video.requestVideoFrameCallback) {
      const shown = (_now, { mediaTime }) => {
        clearTimeout(this.timer);
        this.callback = video.requestVideoFrameCallback(shown);
        this.grab(Math.round(mediaTime * this.result.fps));
      };
      this.callback = video.requestVideoFrameCallback(shown);
    } else {
      const look = () => {
        this.tick = requestAnimationFrame(look);
        if (frameAt(video.currentTime) !== this.frame) this.grab(frameAt(video.currentTime));
      };
      video.addEventListener("play", () => look(), { signal });
      video.addEventListener("pause", () => cancelAnimationFrame(this.tick), { signal });
    }
    const settle = () => {
      clearTimeout(this.timer);
      this.timer = setTimeout(() => this.grab(frameAt(video.currentTime)), LATE);
    };
    video.addEventListener("loadeddata", settle, { signal });
    video.addEventListener("seeked", settle, { signal });
  }

  /** Copy what the source shows now, in one go. */
  grab(frame) {
    const source = this.source;
    const width = source.videoWidth ?? source.naturalWidth, height = source.videoHeight ?? source.naturalHeight;
    if (!width || !height) return;
    if (this.copy.width !== width || this.copy.height !== height) Object.assign(this.copy, { width, height });
    this.copy.getContext("2d").drawImage(source, 0, 0);
    this.frame = Math.min(Math.max(frame, 0), this.result.frames - 1);
    this.ready = true;
    this.onFrame();
  }
}
