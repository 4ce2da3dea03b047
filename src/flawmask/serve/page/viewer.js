// The enlarged image: zoom by wheel, buttons, keys and two fingers; moved by dragging and arrows. Outlines are drawn in
// the image's own pixels, so that they fit at every zoom.
const UNITS = 4; // of an outline's coordinates per pixel, as the server gives them
const STEP = 1.4; // of a zoom by button or key
const MOST = 40; // screen pixels per image pixel
const CLOSE = 3; // from here on, single pixels are shown as squares
const TAG = 14; // the height of a tag's letters on the screen, in pixels

export function drawing(name, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

export class Viewer {
  constructor(frame) {
    this.frame = frame;
    this.stage = frame.querySelector("#stage");
    this.picture = frame.querySelector("#picture");
    this.outlines = frame.querySelector("#outlines");
    this.size = { width: 1, height: 1 };
    this.view = { scale: 1, x: 0, y: 0 };
    this.drawn = [];
    this.fingers = new Map();
    this.listen();
  }

  // Show an image of so many pixels from an address.
  open(src, width, height) {
    this.size = { width, height };
    this.picture.src = src;
    this.outlines.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.stage.hidden = false;
    this.fit();
  }

  close() {
    this.stage.hidden = true;
    this.picture.removeAttribute("src");
    this.draw([]);
  }

  // Draw instances of the server's answer: {outline, box, class, score, marked}.
  draw(instances) {
    this.drawn = instances;
    const scale = `scale(${1 / UNITS})`;
    const shapes = instances.map((one) => {
      const box = ([x, y, w, h]) => `M${x * UNITS} ${y * UNITS}h${w * UNITS}v${h * UNITS}h${-w * UNITS}z`;
      const d = one.outline || box(one.box);
      const paths = [drawing("path", { class: "rim", d }), drawing("path", { d, "fill-rule": "evenodd" })];
      return drawing("g", { transform: scale, class: one.marked ? "marked" : "", "data-class": one.class }, ...paths);
    });
    this.outlines.replaceChildren(...shapes);
    this.tag();
  }

  // Name class and score of each instance where there is room: the highest score comes first.
  tag() {
    for (const text of this.outlines.querySelectorAll("text")) text.remove();
    const height = TAG / this.view.scale;
    const taken = [];
    for (const one of [...this.drawn].sort((a, b) => b.marked - a.marked || b.score - a.score)) {
      const words = `${one.class} ${one.score.toFixed(2)}`;
      const width = 0.6 * height * words.length;
      const x = Math.max(0, Math.min(one.box[0], this.size.width - width));
      const y = Math.max(height, one.box[1] - height / 3);
      if (taken.some(([left, top, length]) => x < left + length && left < x + width && Math.abs(y - top) < height)) continue;
      taken.push([x, y, width]);
      this.outlines.append(drawing("text", { x, y, "font-size": height, "stroke-width": height / 5 }, words));
    }
  }

  // Zoom

  get fitting() {
    const { clientWidth, clientHeight } = this.frame;
    return Math.min(clientWidth / this.size.width, clientHeight / this.size.height);
  }

  fit() {
    this.zoomTo(this.fitting);
  }

  // Zoom to a scale about a point of the frame; by default its middle.
  zoomTo(wanted, x = this.frame.clientWidth / 2, y = this.frame.clientHeight / 2) {
    const scale = Math.min(MOST, Math.max(Math.min(this.fitting, 1), wanted));
    const ratio = scale / this.view.scale;
    this.view = { scale, x: x - (x - this.view.x) * ratio, y: y - (y - this.view.y) * ratio };
    this.place();
  }

  move(across, down) {
    this.view.x += across;
    this.view.y += down;
    this.place();
  }

  // Keep the image in the frame, and in its middle where it is smaller.
  place() {
    const { scale } = this.view;
    const width = this.size.width * scale;
    const height = this.size.height * scale;
    const kept = (at, length, room) => (length <= room ? (room - length) / 2 : Math.min(0, Math.max(room - length, at)));
    this.view.x = kept(this.view.x, width, this.frame.clientWidth);
    this.view.y = kept(this.view.y, height, this.frame.clientHeight);
    this.stage.style.width = `${width}px`;
    this.stage.style.height = `${height}px`;
    this.stage.style.transform = `translate(${this.view.x}px, ${this.view.y}px)`;
    this.stage.classList.toggle("close", scale >= CLOSE);
    this.tag();
  }

  zoom(how) {
    if (how === "in") this.zoomTo(this.view.scale * STEP);
    if (how === "out") this.zoomTo(this.view.scale / STEP);
    if (how === "fit") this.fit();
    if (how === "full") this.zoomTo(1);
  }

  listen() {
    const { frame, fingers } = this;
    new ResizeObserver(() => { if (!this.stage.hidden) this.fit(); }).observe(frame);
    for (const button of frame.querySelectorAll("[data-zoom]"))
      button.addEventListener("click", () => this.zoom(button.dataset.zoom));
    frame.addEventListener("wheel", (event) => {
      event.preventDefault();
      const { left, top } = frame.getBoundingClientRect();
      this.zoomTo(this.view.scale * Math.exp(-event.deltaY / 400), event.clientX - left, event.clientY - top);
    }, { passive: false });
    frame.addEventListener("keydown", (event) => {
      const keys = {
        "+": () => this.zoom("in"), "=": () => this.zoom("in"), "-": () => this.zoom("out"),
        0: () => this.zoom("fit"), 1: () => this.zoom("full"),
        ArrowLeft: () => this.move(60, 0), ArrowRight: () => this.move(-60, 0),
        ArrowUp: () => this.move(0, 60), ArrowDown: () => this.move(0, -60),
      };
      if (!keys[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      keys[event.key]();
    });
    frame.addEventListener("pointerdown", (event) => {
      if (event.target.closest("button")) return;
      frame.setPointerCapture(event.pointerId);
      fingers.set(event.pointerId, event);
      frame.classList.add("moving");
    });
    frame.addEventListener("pointermove", (event) => {
      const before = fingers.get(event.pointerId);
      if (!before) return;
      const other = [...fingers.values()].find((one) => one.pointerId !== event.pointerId);
      if (other) this.pinch(before, event, other);
      else this.move(event.clientX - before.clientX, event.clientY - before.clientY);
      fingers.set(event.pointerId, event);
    });
    for (const end of ["pointerup", "pointercancel"])
      frame.addEventListener(end, (event) => {
        fingers.delete(event.pointerId);
        frame.classList.toggle("moving", fingers.size > 0);
      });
  }

  pinch(before, now, other) {
    const distance = (one) => Math.hypot(one.clientX - other.clientX, one.clientY - other.clientY) || 1;
    const { left, top } = this.frame.getBoundingClientRect();
    const middle = [(now.clientX + other.clientX) / 2 - left, (now.clientY + other.clientY) / 2 - top];
    this.zoomTo((this.view.scale * distance(now)) / distance(before), ...middle);
  }
}
