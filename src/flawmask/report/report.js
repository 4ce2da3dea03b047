"use strict";
// The gallery. The slider sets the threshold of the verdicts, and the filters choose the images. A card is filled when
// it comes near the visible part of the page, so that 500 images open as fast as five.
{
  const script = document.getElementById("gallery-data");
  const { conf, min_area: minArea, images, all } = JSON.parse(script.textContent);
  script.textContent = ""; // frees the memory of the text
  const byId = (id) => document.getElementById(id);
  const slider = byId("threshold");
  const viewer = byId("viewer");
  const cards = byId("cards");
  const state = { threshold: conf, outcome: "all", type: "", open: -1, outlines: true };
  const UNITS = 4; // of an outline's coordinates per pixel of the picture
  const LISTED = 8; // detections under an enlarged image, whether they count or not
  const NAMES = { missed: "Missed", false_alarm: "False alarm", right: "Right" };

  const counts = (one) => one.area >= minArea;
  const isFound = (one) => one.score >= state.threshold && counts(one);
  const score = (image) => Math.max(0, ...image.found.filter(counts).map((one) => one.score));
  const isRejected = (image) => image.found.some(isFound);
  const outcome = (image) =>
    image.truth === isRejected(image) ? "right" : image.truth ? "missed" : "false_alarm";
  const percent = (part, whole) => (whole ? `${(Math.floor(1000 * (part / whole) + 0.5) / 10).toFixed(1)} %` : "n/a");
  // Two decimals, but three where two could stand on either side of the threshold.
  const scoreText = (value) => value.toFixed(Math.abs(value - state.threshold) < 0.01 ? 3 : 2);
  const decimal = (value) => (Math.abs(value - Number(value.toFixed(2))) < 5e-4 ? value.toFixed(2) : value.toFixed(3));

  function element(name, attributes = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }

  function drawing(name, attributes, ...children) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }

  // Pictures

  function outline(path) {
    const scaled = { transform: `scale(${1 / UNITS})` };
    return drawing("g", scaled, drawing("path", { class: "rim", d: path }), drawing("path", { d: path, "fill-rule": "evenodd" }));
  }

  function tag(one, image) {
    const size = Math.max(image.width, image.height) / 36;
    const [x, y] = one.corner;
    const text = `${one.label} ${scoreText(one.score)}`;
    const left = Math.max(0, Math.min(x, image.width - size * 0.6 * text.length));
    const at = { x: left, y: Math.max(size, y - size / 3), "font-size": size, "stroke-width": size / 6 };
    return drawing("text", at, text);
  }

  function draw(svg, image, side, isLarge) {
    const found = image.found.filter((one) => isFound(one) && one.path);
    const outlines = side === "truth" ? image.outlines.map(outline) : found.map((one) => outline(one.path));
    const tags = side === "found" && isLarge ? found.map((one) => tag(one, image)) : [];
    svg.replaceChildren(...outlines, ...tags);
  }

  function panel(image, side, title, isLarge) {
    const svg = drawing("svg", { viewBox: `0 0 ${image.width} ${image.height}`, "aria-hidden": "true" });
    draw(svg, image, side, isLarge);
    const src = `data:image/jpeg;base64,${image.jpeg}`;
    const picture = element("div", { class: "picture" }, element("img", { src, alt: "", decoding: "async" }), svg);
    const shape = image.width / image.height;
    picture.style.setProperty("--shape", isLarge ? shape : Math.min(2, Math.max(0.6, shape)));
    return element("div", { class: `panel ${side}` }, element("span", {}, title), picture);
  }

  const verdictOf = (image) => `verdict: ${isRejected(image) ? "defect" : "good"} (${scoreText(score(image))})`;

  function pair(image, isLarge) {
    const truth = panel(image, "truth", `truth: ${image.truth ? image.type : "good"}`, isLarge);
    const shape = image.width < image.height ? "pair tall" : "pair";
    return element("div", { class: shape }, truth, panel(image, "found", verdictOf(image), isLarge));
  }

  function badge(image) {
    const result = outcome(image);
    return element("span", { class: `outcome ${result}` }, NAMES[result]);
  }

  // Cards

  const shells = images.filter((image) => image.jpeg).map((image, index) => {
    const shell = element("button", { type: "button", class: "card" });
    shell.addEventListener("click", () => open(index));
    return { image, shell, near: false, index };
  });

  function show(card) {
    const { image, shell } = card;
    if (card.drawnAt === undefined) {
      const name = element("span", { title: image.file }, image.file);
      shell.replaceChildren(element("div", { class: "name" }, name, badge(image)), pair(image, false));
    } else if (card.drawnAt !== state.threshold) {
      shell.querySelector(".outcome").replaceWith(badge(image));
      shell.querySelector(".found > span").textContent = verdictOf(image);
      draw(shell.querySelector(".found svg"), image, "found", false);
    }
    shell.setAttribute("aria-label", `Enlarge ${image.file}: ${NAMES[outcome(image)]}`);
    card.drawnAt = state.threshold;
  }

  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      const card = cardOf.get(entry.target);
      card.near = entry.isIntersecting;
      if (card.near) show(card);
    }
  }, { rootMargin: "600px" });
  const cardOf = new Map(shells.map((card) => [card.shell, card]));

  function matches(image) {
    return (state.outcome === "all" || outcome(image) === state.outcome) && (!state.type || image.type === state.type);
  }

  function filter() {
    let some = false;
    for (const { image, shell } of shells) {
      shell.hidden = !matches(image);
      some ||= !shell.hidden;
    }
    byId("nothing").hidden = some;
    for (const button of document.querySelectorAll(".filters [data-outcome]"))
      button.setAttribute("aria-pressed", String(button.dataset.outcome === state.outcome));
    byId("type").value = state.type;
  }

  function sort() {
    const keyed = shells.map((card) => [outcome(card.image) === "right", -Math.abs(card.image.truth - score(card.image)), card]);
    keyed.sort((a, b) => a[0] - b[0] || a[1] - b[1] || a[2].index - b[2].index);
    cards.append(...keyed.map((key) => key[2].shell));
  }

  // Counts

  function count() {
    const tally = { tp: 0, fp: 0, fn: 0, tn: 0 };
    if (all) return countAll();
    for (const image of images) {
      const rejected = isRejected(image);
      tally[image.truth ? (rejected ? "tp" : "fn") : rejected ? "fp" : "tn"] += 1;
    }
    return tally;
  }

  // A report of many images has only some of them. `all` counts the scores of all in steps.
  function countAll() {
    if (state.threshold === conf) return all.atConf;
    const from = Math.ceil(state.threshold * (all.good.length - 1) - 1e-6);
    const sum = (values) => values.reduce((one, other) => one + other, 0);
    const [tp, fp] = [all.defective, all.good].map((values) => sum(values.slice(from)));
    return { tp, fp, fn: sum(all.defective) - tp, tn: sum(all.good) - fp };
  }

  function recount() {
    const { tp, fp, fn, tn } = count();
    slider.value = state.threshold;
    byId("value").textContent = decimal(state.threshold);
    byId("reset").disabled = state.threshold === conf;
    byId("live").textContent =
      `Finds ${tp} of ${tp + fn} defective, rejects ${fp} of ${fp + tn} good. ` +
      `Precision ${percent(tp, tp + fp)}, recall ${percent(tp, tp + fn)}, F1 ${percent(2 * tp, 2 * tp + fp + fn)}.`;
    const numbers = { all: tp + fp + fn + tn, missed: fn, false_alarm: fp, right: tp + tn };
    for (const place of document.querySelectorAll("[data-count]")) place.textContent = numbers[place.dataset.count];
    const line = byId("histogram").querySelector(".at");
    line.setAttribute("x1", 100 * state.threshold);
    line.setAttribute("x2", 100 * state.threshold);
    filter();
    for (const card of shells) if (card.near) show(card);
  }

  function histogram() {
    const bins = 50;
    const sides = { good: new Array(bins).fill(0), defective: new Array(bins).fill(0) };
    const add = (side, value, count) => { sides[side][Math.min(bins - 1, Math.floor(value * bins))] += count; };
    for (const side of all ? ["good", "defective"] : [])
      all[side].forEach((count, step) => add(side, step / (all[side].length - 1), count));
    for (const image of all ? [] : images) add(image.truth ? "defective" : "good", score(image), 1);
    const most = Math.max(1, ...sides.good, ...sides.defective);
    const bar = (side, value, bin) => {
      // The root of the count: one image among hundreds must still be seen.
      const height = 19 * Math.sqrt(value / most);
      const y = side === "defective" ? 20 - height : 20;
      return drawing("rect", { class: side, x: bin * 2 + 0.1, y, width: 1.8, height });
    };
    const place = byId("histogram");
    place.setAttribute("viewBox", "0 0 100 40");
    place.setAttribute("preserveAspectRatio", "none");
    for (const [side, values] of Object.entries(sides))
      place.append(...values.map((value, bin) => bar(side, value, bin)).filter((_, bin) => values[bin]));
    place.append(drawing("line", { x1: 0, x2: 100, y1: 20, y2: 20 }), drawing("line", { class: "at", y1: 0, y2: 40 }));
  }

  // The viewer

  const shownCards = () => [...cards.children].filter((shell) => !shell.hidden).map((shell) => cardOf.get(shell));

  function open(index) {
    state.open = index;
    view();
    if (!viewer.open) viewer.showModal();
  }

  function move(step) {
    const shown = shownCards();
    const at = shown.findIndex((card) => card.index === state.open);
    const next = shown[Math.min(shown.length - 1, Math.max(0, at + step))];
    if (next) open(next.index);
  }

  function button(text, label, act) {
    const made = element("button", { type: "button", "aria-label": label, title: label }, text);
    made.addEventListener("click", act);
    return made;
  }

  function line(one) {
    const small = counts(one) ? "" : `, smaller than ${minArea} pixels`;
    const below = one.score >= state.threshold ? "" : ", below the threshold";
    const text = `${one.label} ${scoreText(one.score)}, ${one.area} pixels${small}${below}`;
    return element("li", isFound(one) ? {} : { class: "below" }, text);
  }

  function lines(image) {
    if (!image.found.length) return [element("li", {}, "no predictions")];
    const listed = image.found.filter((one, place) => isFound(one) || place < LISTED);
    const rest = image.found.length - listed.length;
    const more = rest ? [element("li", { class: "below" }, `${rest} more that do not count`)] : [];
    return [...listed.map(line), ...more];
  }

  function view() {
    const { image } = shells[state.open];
    const shown = shownCards();
    const at = shown.findIndex((card) => card.index === state.open);
    const focused = viewer.contains(document.activeElement) ? document.activeElement.getAttribute("aria-label") : null;
    const large = pair(image, true);
    large.classList.toggle("hidden-outlines", !state.outlines);
    const toggle = button(state.outlines ? "Hide outlines" : "Show outlines", "Outlines on or off (O)", () => outlines());
    viewer.replaceChildren(
      element("div", { class: "bar" },
        element("strong", {}, image.file),
        badge(image),
        element("span", { class: "small" }, at < 0 ? "" : `${at + 1} of ${shown.length}`),
        toggle,
        button("←", "Previous image (left arrow)", () => move(-1)),
        button("→", "Next image (right arrow)", () => move(1)),
        button("Close", "Close (Escape)", () => viewer.close())),
      large,
      element("ul", {}, ...lines(image)));
    const again = [...viewer.querySelectorAll("button")].find((one) => one.getAttribute("aria-label") === focused);
    if (again) again.focus();
  }

  function outlines() {
    state.outlines = !state.outlines;
    view();
  }

  // Events

  slider.addEventListener("input", () => { state.threshold = Number(slider.value); recount(); });
  slider.addEventListener("change", sort); // only when the slider is released, or cards would jump while it moves
  byId("reset").addEventListener("click", () => { state.threshold = conf; recount(); sort(); });
  byId("type").addEventListener("change", (event) => { state.type = event.target.value; filter(); });
  for (const one of document.querySelectorAll(".filters [data-outcome]"))
    one.addEventListener("click", () => { state.outcome = one.dataset.outcome; filter(); });
  for (const one of document.querySelectorAll("[data-file]")) {
    const index = shells.findIndex((card) => card.image.file === one.dataset.file);
    one.disabled = index < 0; // the gallery is limited and does not show it
    one.addEventListener("click", () => open(index));
  }
  viewer.addEventListener("keydown", (event) => {
    const keys = { ArrowLeft: () => move(-1), ArrowRight: () => move(1), o: outlines, O: outlines };
    if (!keys[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    keys[event.key]();
  });
  viewer.addEventListener("click", (event) => { if (event.target === viewer) viewer.close(); });
  addEventListener("beforeprint", () => {
    for (const card of shells) if (!card.shell.hidden) show(card);
  });

  histogram();
  cards.append(...shells.map((card) => card.shell));
  recount();
  for (const card of shells) watcher.observe(card.shell);
}
