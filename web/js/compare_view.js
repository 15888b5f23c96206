// Which part of a picture a stage shows, and where: zoom, pan and the line between before and after. No page in here.

const MAX_ZOOM = 32;

const within = (value, low, high) => Math.min(Math.max(value, low), high);

export class CompareView {
  constructor() {
    this.reset();
  }

  /** All of the picture, the line in the middle. */
  reset() {
    this.line = 0.5; // of the stage's width
    this.zoom = 1; // 1: the whole picture fits
    this.x = this.y = 0.5; // the picture's point in the middle of the stage, in its sides
  }

  /** The picture's rectangle on a stage, both given in pixels; it may reach beyond the stage. */
  place(stage, picture) {
    const scale = Math.min(stage.width / picture.width, stage.height / picture.height) * this.zoom;
    const width = picture.width * scale, height = picture.height * scale;
    this.x = held(this.x, stage.width / width);
    this.y = held(this.y, stage.height / height);
    return { left: stage.width / 2 - this.x * width, top: stage.height / 2 - this.y * height, width, height, scale };
  }

  /** Zoom by a factor; what lies under `point` of the stage stays there. */
  zoomAt(factor, point, stage, picture) {
    const before = this.place(stage, picture);
    this.zoom = within(this.zoom * factor, 1, MAX_ZOOM);
    const x = (point.x - before.left) / before.width, y = (point.y - before.top) / before.height;
    const after = this.place(stage, picture);
    this.x = x + (stage.width / 2 - point.x) / after.width;
    this.y = y + (stage.height / 2 - point.y) / after.height;
    this.place(stage, picture);
  }

  /** Move the picture by pixels of the stage. */
  pan(dx, dy, stage, picture) {
    const { width, height } = this.place(stage, picture);
    this.x -= dx / width;
    this.y -= dy / height;
    this.place(stage, picture);
  }

  moveLine(share) {
    this.line = within(share, 0, 1);
  }
}

/** A middle that keeps the picture's edges out of the stage; 0.5 if the stage shows all of that side. */
function held(middle, shown) {
  return shown >= 1 ? 0.5 : within(middle, shown / 2, 1 - shown / 2);
}
