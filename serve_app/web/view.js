// The picture and its objects on a canvas: where they are, how large, and how they look.

import { maskOf } from "./objects.js";
import { decode } from "./rle.js";

const MARGIN = 16; // CSS pixels around an image that fits
const [SMALLEST, LARGEST] = [0.02, 40]; // CSS pixels an image pixel
const SHARP = 2; // from here on, pixels are shown as squares

const within = (scale) => Math.min(Math.max(scale, SMALLEST), LARGEST);
export const tenths = (value) => Math.round(10 * value) / 10;
export const colour = (number) => `hsl(${(number * 137.508 + 40) % 360} 85% 58%)`;

/** A screen point is an image point × `scale` + (`left`, `top`), in CSS pixels of the canvas. */
export class View {
  picture = null;
  box = null; // that is being drawn, image pixels
  corner = null; // of one by keyboard
  cross = false; // whether the keyboard points, at the middle
  masks = true;
  scale = 1;
  left = 0;
  top = 0;
  #fits = true;
  #frame = 0;

  constructor(canvas, objects, onChange) {
    Object.assign(this, { canvas, objects, onChange });
    objects.addEventListener("change", () => this.draw());
    new ResizeObserver(() => this.#resize()).observe(canvas);
  }

  show(picture) {
    this.picture = picture;
    this.fit();
  }

  /** CSS pixels of the canvas → image pixels. */
  toImage(x, y) { return [(x - this.left) / this.scale, (y - this.top) / this.scale]; }
  get middle() { return this.toImage(this.canvas.clientWidth / 2, this.canvas.clientHeight / 2); }
  /** Two corners, image pixels → the box between them, as much of it as the image has. */
  boxed(a, b) {
    const { width, height } = this.picture;
    const [xs, ys] = [0, 1].map((axis) => [a[axis], b[axis]].sort((p, q) => p - q));
    const inner = (value, most) => tenths(Math.min(Math.max(value, 0), most));
    return [inner(xs[0], width), inner(ys[0], height), inner(xs[1], width), inner(ys[1], height)];
  }

  inside([x, y]) { return x >= 0 && y >= 0 && x <= this.picture?.width && y <= this.picture?.height; }

  fit() {
    if (!this.picture) return this.draw();
    const { clientWidth: w, clientHeight: h } = this.canvas, { width, height } = this.picture;
    this.scale = within(Math.min((w - 2 * MARGIN) / width, (h - 2 * MARGIN) / height));
    this.left = (w - width * this.scale) / 2;
    this.top = (h - height * this.scale) / 2;
    this.#fits = true;
    this.draw();
  }

  /** Around a point of the canvas that stays where it is; the middle if none is given. */
  zoom(factor, x = this.canvas.clientWidth / 2, y = this.canvas.clientHeight / 2) {
    const scale = within(this.scale * factor), by = scale / this.scale;
    this.scale = scale;
    this.pan((x - this.left) * (1 - by), (y - this.top) * (1 - by));
  }

  /** CSS pixels; some of the image stays at the middle. */
  pan(dx, dy) {
    if (!this.picture) return;
    const { clientWidth: w, clientHeight: h } = this.canvas, { width, height } = this.picture;
    this.left = Math.min(Math.max(this.left + dx, w / 2 - width * this.scale), w / 2);
    this.top = Math.min(Math.max(this.top + dy, h / 2 - height * this.scale), h / 2);
    this.#fits = false;
    this.draw();
  }

  draw() {
    cancelAnimationFrame(this.#frame);
    this.#frame = requestAnimationFrame(() => this.#paint());
    this.onChange();
  }

  /** The picture with the objects that are shown, at its own size → Blob, a PNG. */
  async flattened() {
    const { width, height } = this.picture, canvas = new OffscreenCanvas(width, height), at = canvas.getContext("2d");
    this.#scene(at, 1);
    return canvas.convertToBlob();
  }

  #resize() {
    const ratio = devicePixelRatio, { clientWidth, clientHeight } = this.canvas;
    this.canvas.width = Math.round(clientWidth * ratio);
    this.canvas.height = Math.round(clientHeight * ratio);
    if (this.#fits) this.fit();
    else this.pan(0, 0);
  }

  #paint() {
    const at = this.canvas.getContext("2d"), ratio = devicePixelRatio, scale = this.scale * ratio;
    at.setTransform(1, 0, 0, 1, 0, 0);
    at.clearRect(0, 0, this.canvas.width, this.canvas.height);
    if (!this.picture) return;
    at.setTransform(scale, 0, 0, scale, this.left * ratio, this.top * ratio);
    this.#scene(at, this.scale);
    const selected = this.objects.selected;
    if (selected && !selected.hidden) this.#prompt(at, selected);
    if (this.box) frame(at, this.box, this.scale, "#fff");
    if (this.cross) this.#cross(at);
  }

  #scene(at, scale) {
    const { bitmap, width, height } = this.picture, { list, selected } = this.objects;
    at.imageSmoothingEnabled = scale < SHARP;
    at.imageSmoothingQuality = "high";
    at.fillStyle = "#808080";
    if (bitmap) at.drawImage(bitmap, 0, 0, width, height);
    else at.fillRect(0, 0, width, height);
    if (!this.masks) return;
    const shown = list.filter((one) => !one.hidden && one !== selected && maskOf(one)?.area);
    shown.sort((a, b) => maskOf(b).area - maskOf(a).area); // so that none lies under a larger one
    for (const one of shown) paintMask(at, one, scale, false);
    if (selected && !selected.hidden) paintMask(at, selected, scale, true);
  }

  #prompt(at, { prompt, number }) {
    if (prompt.box) frame(at, prompt.box, this.scale, colour(number));
    const unit = 1 / this.scale;
    for (const [x, y, on] of prompt.points) {
      at.beginPath();
      at.arc(x, y, 6 * unit, 0, 2 * Math.PI);
      at.fillStyle = on ? "#128a43" : "#d32f2f";
      at.fill();
      stroke(at, null, 2 * unit, "#fff");
      at.beginPath();
      at.moveTo(x - 3 * unit, y);
      at.lineTo(x + 3 * unit, y);
      if (on) at.moveTo(x, y - 3 * unit);
      if (on) at.lineTo(x, y + 3 * unit);
      at.stroke();
    }
  }

  #cross(at) {
    const [x, y] = this.middle, unit = 1 / this.scale, path = new Path2D();
    for (const [dx, dy] of [[1, 0], [-1, 0], [0, 1], [0, -1]]) {
      path.moveTo(x + 5 * dx * unit, y + 5 * dy * unit);
      path.lineTo(x + 18 * dx * unit, y + 18 * dy * unit);
    }
    stroke(at, path, 4 * unit, "#000a");
    stroke(at, path, 2 * unit, "#fff");
  }
}

const looks = new WeakMap(); // of masks

function paintMask(at, one, scale, selected) {
  const mask = maskOf(one);
  if (!mask?.area) return;
  if (!looks.has(mask)) looks.set(mask, look(mask, colour(one.number)));
  const { sprite, outline, x, y } = looks.get(mask);
  at.globalAlpha = selected ? 0.5 : 0.38;
  at.drawImage(sprite, x, y);
  at.globalAlpha = 1;
  if (selected) stroke(at, outline, 4.5 / scale, "#000b");
  stroke(at, outline, (selected ? 2.25 : 1.25) / scale, selected ? "#fff" : colour(one.number));
}

function look(mask, fill) {
  const { x, y, width, height, plane } = decode(mask), sprite = new OffscreenCanvas(width, height);
  const at = sprite.getContext("2d"), pixels = at.createImageData(width, height);
  plane.forEach((on, index) => (pixels.data[4 * index + 3] = 255 * on));
  at.putImageData(pixels, 0, 0);
  at.globalCompositeOperation = "source-in";
  at.fillStyle = fill;
  at.fillRect(0, 0, width, height);
  return { sprite, x, y, outline: outlined(plane, x, y, width, height) };
}

/** The edges between pixels on and off, in image pixels. */
function outlined(plane, left, top, width, height) {
  const path = new Path2D(), on = (x, y) => x >= 0 && y >= 0 && x < width && y < height && plane[y * width + x];
  const edges = (lines, length, differs, line) => {
    for (let at = 0; at <= lines; at++) {
      for (let from = -1, i = 0; i <= length; i++) {
        const edge = i < length && differs(at, i);
        if (edge && from < 0) from = i;
        if (!edge && from >= 0) line(at, from, i), (from = -1);
      }
    }
  };
  const across = (y, from, to) => (path.moveTo(left + from, top + y), path.lineTo(left + to, top + y));
  const down = (x, from, to) => (path.moveTo(left + x, top + from), path.lineTo(left + x, top + to));
  edges(height, width, (y, x) => Boolean(on(x, y)) !== Boolean(on(x, y - 1)), across);
  edges(width, height, (x, y) => Boolean(on(x, y)) !== Boolean(on(x - 1, y)), down);
  return path;
}

function stroke(at, path, width, style) {
  at.lineWidth = width;
  at.strokeStyle = style;
  at.lineCap = "round";
  path ? at.stroke(path) : at.stroke();
}

function frame(at, [x0, y0, x1, y1], scale, style) {
  const path = new Path2D();
  path.rect(x0, y0, x1 - x0, y1 - y0);
  stroke(at, path, 3.5 / scale, "#000a");
  stroke(at, path, 1.5 / scale, style);
}
