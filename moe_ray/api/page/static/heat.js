// The heat map: a cell for each layer and expert. Colour: its share of the work; a flash: a token goes through it now.

import { calm } from "./theme.js";

const LEFT = 26;
const BOTTOM = 18;
const FADE_MS = 650;
const FACES = "10.5px Inter, system-ui, sans-serif";

export class Heat {
  constructor(canvas, told) {
    this._canvas = canvas;
    this._told = told; // is given the text of what is under the pointer
    this._layers = this._experts = 0;
    this._values = this._glow = new Float64Array(0);
    this._marks = null;
    this._frame = 0;
    this._at = 0;
    canvas.addEventListener("pointermove", (event) => this._point(event));
    canvas.addEventListener("pointerleave", () => told(""));
    new ResizeObserver(() => this.draw()).observe(canvas);
  }

  shape(layers, experts) {
    if (layers === this._layers && experts === this._experts) return;
    this._layers = layers;
    this._experts = experts;
    this._values = new Float64Array(layers * experts);
    this._glow = new Float64Array(layers * experts);
    this._marks = null;
  }

  // `values`: of [layer * experts + expert].
  show(values, unit) {
    if (values.length === this._values.length) this._values = values;
    this._unit = unit;
    this._ask();
  }

  // Mark the cells of one token, [layer][k]; null: none.
  mark(chosen) {
    this._marks = chosen;
    this._ask();
  }

  // A token goes through these cells, [layer][k].
  flash(chosen) {
    if (calm.matches) this._glow.fill(0); // no fading: the last token alone is shown
    chosen.forEach((experts, layer) => experts.forEach((expert) => (this._glow[layer * this._experts + expert] = 1)));
    this._ask();
  }

  rest() {
    if (calm.matches) this._glow.fill(0);
    this._ask();
  }

  _ask() {
    if (this._frame) return;
    this._frame = requestAnimationFrame((now) => {
      this._frame = 0;
      this._fade(now);
      this.draw();
    });
  }

  _fade(now) {
    const step = calm.matches ? 0 : Math.min(now - this._at, 100);
    this._at = now;
    if (!step) return;
    const left = Math.exp(-step / FADE_MS);
    let some = false;
    for (let i = 0; i < this._glow.length; i++) {
      this._glow[i] = this._glow[i] > 0.02 ? this._glow[i] * left : 0;
      some ||= this._glow[i] > 0;
    }
    if (some) this._ask();
  }

  _size() {
    const width = this._canvas.clientWidth;
    const rows = Math.max(this._experts, 1);
    const cell = Math.max(3, Math.min(22, Math.floor(300 / rows)));
    return { width, height: rows * cell + BOTTOM, wide: (width - LEFT) / Math.max(this._layers, 1), high: cell };
  }

  draw() {
    const { width, height, wide, high } = this._size();
    if (!width || !this._layers) return;
    const scale = devicePixelRatio || 1;
    this._canvas.style.height = `${height}px`;
    this._canvas.width = Math.round(width * scale);
    this._canvas.height = Math.round(height * scale);
    const pen = this._canvas.getContext("2d");
    pen.scale(scale, scale);
    const style = getComputedStyle(document.documentElement);
    const stops = [0, 1, 2, 3].map((i) => rgb(pen, style.getPropertyValue(`--heat-${i}`)));
    const most = Math.max(1e-9, ...this._values);
    const gap = high > 8 && wide > 6 ? 1.5 : 0.5;
    const round = high > 8 && wide > 6 ? 2.5 : 0;
    for (let layer = 0; layer < this._layers; layer++) {
      for (let expert = 0; expert < this._experts; expert++) {
        const i = layer * this._experts + expert;
        const box = [LEFT + layer * wide, expert * high, wide - gap, high - gap];
        pen.globalAlpha = this._marks ? 0.5 : 1;
        pen.fillStyle = between(stops, Math.sqrt(this._values[i] / most));
        fill(pen, box, round);
        if (this._glow[i] > 0.02) {
          pen.globalAlpha = this._glow[i];
          pen.fillStyle = style.getPropertyValue("--mark");
          fill(pen, inner(box), round);
        }
      }
    }
    pen.globalAlpha = 1;
    this._drawMarks(pen, style, wide, high, gap, round);
    this._drawAxes(pen, style, wide, high, height);
  }

  _drawMarks(pen, style, wide, high, gap, round) {
    if (!this._marks) return;
    pen.fillStyle = style.getPropertyValue("--mark");
    this._marks.forEach((experts, layer) => {
      for (const expert of experts) fill(pen, [LEFT + layer * wide, expert * high, wide - gap, high - gap], round);
    });
  }

  _drawAxes(pen, style, wide, high, height) {
    pen.fillStyle = style.getPropertyValue("--muted");
    pen.font = FACES;
    pen.textBaseline = "middle";
    const everyRow = Math.ceil(13 / high);
    for (let expert = 0; expert < this._experts; expert += everyRow) pen.fillText(`E${expert}`, 0, expert * high + high / 2);
    pen.textAlign = "center";
    const everyColumn = this._layers > 40 ? 10 : 5;
    for (let layer = 0; layer < this._layers; layer += everyColumn) {
      pen.fillText(layer === 0 ? "L0" : String(layer), LEFT + layer * wide + wide / 2, height - 6);
    }
    pen.textAlign = "left";
  }

  _point(event) {
    const { wide, high } = this._size();
    const layer = Math.floor((event.offsetX - LEFT) / wide);
    const expert = Math.floor(event.offsetY / high);
    if (layer < 0 || layer >= this._layers || expert < 0 || expert >= this._experts) return this._told("");
    const value = this._values[layer * this._experts + expert];
    this._told(`Layer ${layer}, expert ${expert}: ${Math.round(value)} ${this._unit ?? ""}`);
  }
}

function fill(pen, [x, y, wide, high], round) {
  pen.beginPath();
  pen.roundRect(x, y, Math.max(wide, 0.5), Math.max(high, 0.5), round);
  pen.fill();
}

// The middle of a cell: a flash leaves its colour to be seen.
function inner([x, y, wide, high]) {
  return [x + 0.22 * wide, y + 0.22 * high, 0.56 * wide, 0.56 * high];
}

function rgb(pen, colour) {
  pen.fillStyle = colour.trim();
  return [1, 3, 5].map((at) => Number.parseInt(pen.fillStyle.slice(at, at + 2), 16));
}

// The colour at `share` (0 to 1) of the way along the stops.
function between(stops, share) {
  const at = Math.min(Math.max(share, 0), 1) * (stops.length - 1);
  const low = Math.min(Math.floor(at), stops.length - 2);
  const mixed = stops[low].map((value, i) => Math.round(value + (stops[low + 1][i] - value) * (at - low)));
  return `rgb(${mixed.join(" ")})`;
}
