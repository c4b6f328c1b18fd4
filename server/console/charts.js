// Small charts of the last minutes, as SVG.

const WIDTH = 280;
const HEIGHT = 74;
const SPAN_SECONDS = 180;

export const CHARTS = [
  { key: "throughput", title: "Tokens per second", names: ["generated", "prompt"] },
  { key: "ttft", title: "Time to first token", names: ["median", "p95"], unit: "ms" },
  { key: "itl", title: "Between tokens", names: ["median", "p95"], unit: "ms" },
  { key: "sequences", title: "Sequences", names: ["running", "waiting"], least: 4 },
  { key: "kv", title: "KV cache in use", names: ["used"], unit: "%", top: 100 },
  { key: "adapters", title: "Adapters", names: ["device", "host", "disk"], least: 4 },
];

function svg(name, parent, attributes = {}) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  parent.append(node);
  return node;
}

export function format(value, unit) {
  if (!Number.isFinite(value)) return "–";
  if (unit === "ms" && value >= 1000) return `${(value / 1000).toFixed(2)} s`;
  const text = value >= 100 || Number.isInteger(value) ? value.toFixed(0) : value.toFixed(1);
  return unit ? `${text} ${unit}` : text;
}

/** The smallest round number (1, 2 or 5 times a power of ten) that is not below the value. */
function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((factor) => factor * power).find((round) => round >= value);
}

export class Chart {
  #points = []; // [seconds, …values]
  #hovered = null;

  constructor({ key, title, names, unit = "", top = null, least = 1 }, parent) {
    Object.assign(this, { key, title, names, unit, top, least });
    const figure = document.createElement("figure");
    figure.className = "chart";
    const caption = Object.assign(document.createElement("figcaption"), { textContent: title });
    this.scale = Object.assign(document.createElement("span"), { className: "scale" });
    caption.append(this.scale);
    figure.append(caption);
    this.svg = svg("svg", figure, {
      viewBox: `0 0 ${WIDTH} ${HEIGHT}`,
      preserveAspectRatio: "none",
      role: "img",
    });
    svg("line", this.svg, { class: "grid", x1: 0, x2: WIDTH, y1: 0.5, y2: 0.5 });
    this.areas = names.map((_, i) => svg("path", this.svg, { class: `area c${i}` }));
    this.lines = names.map((_, i) => svg("path", this.svg, { class: `c${i}` }));
    this.cursor = svg("line", this.svg, { class: "cursor", y1: 0, y2: HEIGHT, visibility: "hidden" });
    const legend = document.createElement("ul");
    legend.className = "legend";
    this.values = names.map((name, i) => {
      const item = Object.assign(document.createElement("li"), { className: `c${i}` });
      const number = document.createElement("b");
      item.append(`${name} `, number);
      legend.append(item);
      return number;
    });
    figure.append(legend);
    parent.append(figure);
    this.svg.addEventListener("pointermove", (event) => this.#hover(event));
    this.svg.addEventListener("pointerleave", () => {
      this.#hovered = null;
      this.#draw();
    });
  }

  add(seconds, values) {
    this.#points.push([seconds, ...values]);
    while (this.#points[0][0] < seconds - SPAN_SECONDS) this.#points.shift();
    this.#draw();
  }

  #hover(event) {
    const box = this.svg.getBoundingClientRect();
    const end = this.#points.at(-1)?.[0] ?? 0;
    const at = end - SPAN_SECONDS * (1 - (event.clientX - box.left) / box.width);
    const distance = (point) => Math.abs(point[0] - at);
    this.#hovered = this.#points.reduce(
      (best, point) => (best === null || distance(point) < distance(best) ? point : best),
      null,
    );
    this.#draw();
  }

  #draw() {
    const last = this.#points.at(-1);
    if (!last) return;
    const known = this.#points.flatMap((point) => point.slice(1)).filter(Number.isFinite);
    const top = this.top ?? roundUp(Math.max(this.least, ...known));
    const x = (seconds) => WIDTH * (1 - (last[0] - seconds) / SPAN_SECONDS);
    const y = (value) => HEIGHT - (HEIGHT - 2) * Math.min(1, value / top);
    this.names.forEach((_, index) => {
      const runs = [[]];
      for (const point of this.#points) {
        const value = point[index + 1];
        if (Number.isFinite(value)) runs.at(-1).push([x(point[0]), y(value)]);
        else if (runs.at(-1).length) runs.push([]);
      }
      const path = (run) => run.map(([px, py]) => `${px.toFixed(1)} ${py.toFixed(1)}`).join("L");
      const drawn = runs.filter((run) => run.length);
      this.lines[index].setAttribute("d", drawn.map((run) => `M${path(run)}h.1`).join(""));
      const close = (run) =>
        `M${run[0][0].toFixed(1)} ${HEIGHT}L${path(run)}L${run.at(-1)[0].toFixed(1)} ${HEIGHT}Z`;
      this.areas[index].setAttribute("d", drawn.map(close).join(""));
    });
    this.scale.textContent = format(top, this.unit);
    const shown = this.#hovered ?? last;
    this.cursor.setAttribute("visibility", this.#hovered ? "visible" : "hidden");
    this.cursor.setAttribute("x1", x(shown[0]));
    this.cursor.setAttribute("x2", x(shown[0]));
    const texts = this.names.map((name, index) => format(shown[index + 1], this.unit));
    texts.forEach((text, index) => (this.values[index].textContent = text));
    const spoken = this.names.map((name, index) => `${name} ${texts[index]}`).join(", ");
    this.svg.setAttribute("aria-label", `${this.title}: ${spoken}; scale to ${format(top, this.unit)}`);
  }
}
