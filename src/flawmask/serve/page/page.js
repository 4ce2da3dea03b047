// The page: images go to the server, and verdicts, outlines and scores are shown. Names of files are always set as
// text, never as HTML.
import { coco, csv, json, png, save } from "/downloads.js";
import { Viewer } from "/viewer.js";

const AT_ONCE = 2; // images that are sent at the same time
const KEPT = 200; // images in the strip; the oldest go first
const PAUSE = 1000; // milliseconds between attempts while the server is away
const KEY = "flawmask-token"; // in the tab's own storage, which ends with the tab
const FIGURES = {
  image_auroc: "AUROC", f1_score: "F1", recall: "recall", false_alarm_rate: "false alarms",
  mask_ap50: "mask AP50", box_ap50: "box AP50", pixel_aupro: "AUPRO",
};

const byId = (id) => document.getElementById(id);
const viewer = new Viewer(byId("viewer"));
const state = { items: [], current: null, threshold: 0.5, filter: "all", hidden: new Set(), model: null, sending: 0, numbers: 0 };

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

const percent = (value) => `${(100 * value).toFixed(1)} %`;
const wait = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));

// The server

// Send a request with the token, and ask for it where it is needed.
async function ask(path, options = {}) {
  for (let tries = 0; ; tries += 1) {
    const token = sessionStorage.getItem(KEY);
    const headers = { ...options.headers, ...(token ? { Authorization: `Bearer ${token}` } : {}) };
    const response = await fetch(path, { ...options, headers });
    if (response.status !== 401) return response;
    if (sessionStorage.getItem(KEY) === token) await askForToken(tries > 0);
  }
}

let asking = null;

function askForToken(wasWrong) {
  const dialog = byId("token");
  asking ??= new Promise((done) => {
    byId("wrong").hidden = !wasWrong;
    dialog.showModal();
    dialog.oncancel = (event) => event.preventDefault();
    dialog.querySelector("form").onsubmit = (event) => {
      event.preventDefault();
      sessionStorage.setItem(KEY, byId("secret").value.trim());
      byId("secret").value = "";
      dialog.close();
      asking = null;
      done();
    };
  });
  return asking;
}

// The name of the model that was chosen; none where there is no choice.
const chosen = () => (byId("models").hidden ? "" : byId("chosen").value);

const query = (model, more = {}) => new URLSearchParams({ ...more, ...(model ? { model } : {}) });

async function loadModel() {
  let response = await ask(`/v1/model?${query(chosen())}`);
  if (response.status === 404) response = await ask("/v1/model"); // the server was started again with other models
  if (!response.ok) throw new Error(`the server answered ${response.status}`);
  const model = await response.json();
  const isNew = state.model === null || state.model.sha256 !== model.sha256 || state.model.threshold.value !== model.threshold.value;
  state.model = model;
  if (isNew) state.threshold = model.threshold.value;
  byId("model").textContent = aboutModel(model);
  const select = byId("chosen");
  byId("models").hidden = model.models.length < 2;
  if ([...select.options].map((one) => one.value).join() !== model.models.join()) {
    select.replaceChildren(...model.models.map((name) => element("option", { value: name }, name)));
    select.value = model.model;
  }
  render();
}

function aboutModel(model) {
  const { threshold, figures } = model;
  const chosen = { default: "the default", given: "given", aim: `chosen for ${threshold.aim} on ${threshold.chosen_on}` }[threshold.how];
  const measured = figures ? aboutFigures(figures) : "not measured: no results of this model are beside it";
  const problem = model.problem ? `. A newer file is not used: ${model.problem}` : "";
  return `${model.model} (${model.architecture}, ${model.sha256.slice(0, 8)}), threshold ${threshold.value.toFixed(2)} (${chosen}); ${measured}${problem}`;
}

// Figures that were measured with other settings than the server's do not hold here. The server leaves them out.
function aboutFigures({ images, split, metrics, measured_with: used, differs }) {
  const shown = Object.entries(metrics).filter(([key]) => FIGURES[key]).map(([key, one]) => figure(FIGURES[key], one));
  const others = differs.map((name) => (name === "conf" ? "this threshold" : `${name} ${used[name] ?? "off"}`)).join(", ");
  const left = others ? [`figures that hold for ${others} only are left out`] : [];
  return `measured on ${images} images (${split}) at threshold ${used.conf.toFixed(2)}: ${[...shown, ...left].join(", ")}`;
}

function figure(name, { value, interval }) {
  const range = interval && interval[0] !== null ? ` (${(100 * interval[0]).toFixed(1)} to ${(100 * interval[1]).toFixed(1)})` : "";
  return `${name} ${percent(value)}${range}`;
}

let returning = null;

// Wait until the server is back: until it has answered, whatever went wrong before. Images wait meanwhile, and no verdict
// is shown for them.
function untilBack() {
  returning ??= (async () => {
    const note = byId("away");
    note.textContent = "The server does not answer. Images wait until it is back.";
    note.hidden = false;
    for (;;) {
      await wait(PAUSE);
      try {
        await loadModel();
        break;
      } catch {
        continue;
      }
    }
    note.hidden = true;
    returning = null;
  })();
  return returning;
}

// Images

function add(files) {
  const added = [...files].map((file) => ({
    id: (state.numbers += 1), name: file.name || "image", file, url: URL.createObjectURL(file), answer: null, shown: null, model: null, chosen: chosen(),
  }));
  state.items.push(...added);
  trim();
  if (added.length) open(added[0]);
  for (let free = AT_ONCE - state.sending; free > 0; free -= 1) sendNext();
}

// Drop the oldest images that have an answer. Those that wait stay, however many there are.
function trim() {
  while (state.items.length > KEPT) {
    const old = state.items.findIndex((item) => item.answer && item !== state.current);
    if (old < 0) return;
    forget(state.items.splice(old, 1)[0]);
  }
}

function forget(item) {
  URL.revokeObjectURL(item.url);
  if (item.shown && item.shown.src !== item.url) URL.revokeObjectURL(item.shown.src);
  if (state.current === item) state.current = null;
}

async function sendNext() {
  const item = state.items.find((one) => !one.answer && !one.isSent);
  if (!item) return;
  item.isSent = true;
  state.sending += 1;
  try {
    await send(item);
  } finally {
    state.sending -= 1;
    trim();
    render();
    if (state.current === item) show(item);
    sendNext();
  }
}

async function send(item) {
  for (;;) {
    try {
      const response = await ask(`/v1/predict?${query(item.chosen, { min_score: 0, outlines: true })}`, {
        method: "POST", body: item.file, headers: { "Content-Type": "application/octet-stream" },
      });
      const content = await response.json();
      if (response.status === 503) {
        await wait(1000 * Number(response.headers.get("Retry-After") || 1));
        continue;
      }
      item.answer = content.images?.[0] ?? { file: item.name, verdict: null, reason: content.reason };
      item.model = { model: content.model, sha256: content.sha256, threshold: content.threshold };
      const isOther = response.status === 404 || (content.sha256 && content.sha256 !== state.model?.sha256);
      if (isOther) loadModel().catch(untilBack);
      return;
    } catch { // no answer, or one that was cut off
      await untilBack();
    }
  }
}

// What the browser shows: the image itself, or the server's PNG of it where the browser does not know the format.
async function pictureOf(item) {
  if (item.shown) return item.shown;
  const image = new Image();
  image.src = item.url;
  try {
    await image.decode();
    item.shown = { src: item.url, width: image.naturalWidth, height: image.naturalHeight };
  } catch {
    if (!item.answer || item.answer.verdict === null) return null;
    const response = await ask(`/v1/image?${query(item.chosen)}`, { method: "POST", body: item.file, headers: { "Content-Type": "application/octet-stream" } });
    if (!response.ok) return null;
    const src = URL.createObjectURL(await response.blob());
    item.shown = { src, width: item.answer.width, height: item.answer.height };
  }
  return item.shown;
}

// The shown image

function open(item) {
  state.current = item;
  state.hidden.clear();
  show(item);
}

async function show(item) {
  render();
  const picture = await pictureOf(item).catch(() => null);
  if (state.current !== item) return;
  byId("empty").hidden = picture !== null;
  byId("empty").textContent = "This image cannot be shown";
  if (picture === null) viewer.close();
  else if (viewer.picture.src !== picture.src) viewer.open(picture.src, picture.width, picture.height);
  drawOutlines();
}

const isHidden = (one, index) => state.hidden.has(index) || state.hidden.has(one.class);
const reaches = (one) => one.score >= state.threshold && one.area >= (state.model?.min_area ?? 0);

// What another threshold would say. The verdict that counts is the server's.
const verdictAt = (answer, threshold) => (answer.verdict === null ? null : answer.score > 0 && answer.score >= threshold ? "defect" : "good");

function drawOutlines() {
  const item = state.current;
  const instances = item?.answer?.instances ?? [];
  const drawn = instances.map((one, index) => ({ ...one, index, marked: index === state.marked }));
  viewer.draw(drawn.filter((one) => reaches(one) && !isHidden(one, one.index)));
}

const keyOf = (item) => (item.answer ? item.answer.verdict ?? "none" : "waiting");

function words(item) {
  if (!item.answer) return "waiting";
  return item.answer.verdict === null ? "no verdict" : `${item.answer.verdict} ${item.answer.score.toFixed(2)}`;
}

const badge = (item) => element("span", { class: `badge ${keyOf(item)}` }, words(item));

function render() {
  const item = state.current;
  const answer = item?.answer;
  byId("name").textContent = item ? item.name : "";
  byId("verdict").replaceChildren(...(item ? [badge(item)] : []));
  byId("reason").textContent = answer?.reason ?? "";
  if (!item) {
    viewer.close();
    byId("empty").hidden = false;
    byId("empty").textContent = "Drop images here";
  }
  renderThreshold(answer);
  renderToggles(answer);
  renderStrip();
  drawOutlines();
  for (const button of document.querySelectorAll("[data-download]"))
    button.disabled = button.dataset.download === "png" ? !answer || answer.verdict === null : !state.items.some((one) => one.answer);
}

function renderThreshold(answer) {
  const own = state.model?.threshold.value;
  const isOwn = state.threshold === own;
  byId("threshold").value = state.threshold;
  byId("value").textContent = state.threshold.toFixed(2);
  byId("reset").hidden = isOwn || own === undefined;
  const verdict = answer ? verdictAt(answer, state.threshold) : null;
  byId("would").textContent = isOwn || own === undefined ? "" : verdict ? `At ${state.threshold.toFixed(2)} it would be: ${verdict}. Back to` : "Back to";
}

function toggle(text, key, className = "") {
  const box = element("input", { type: "checkbox" });
  box.checked = !state.hidden.has(key);
  box.addEventListener("change", () => {
    if (box.checked) state.hidden.delete(key);
    else state.hidden.add(key);
    drawOutlines();
  });
  const label = element("label", { class: className }, box, text);
  const mark = (index) => () => { state.marked = index; drawOutlines(); };
  if (typeof key === "number") {
    for (const event of ["pointerenter", "focusin"]) label.addEventListener(event, mark(key));
    for (const event of ["pointerleave", "focusout"]) label.addEventListener(event, mark(null));
  }
  return label;
}

function renderToggles(answer) {
  const instances = answer?.instances ?? [];
  const names = [...new Set(instances.map((one) => one.class))];
  const kept = instances.map((one, index) => ({ one, index })).sort((a, b) => b.one.score - a.one.score);
  byId("classes").hidden = names.length < 1;
  byId("classes").querySelector("div").replaceChildren(...names.map((name) => toggle(name, name)));
  byId("instances").hidden = instances.length < 1;
  byId("instances").querySelector("ol").replaceChildren(...kept.map(({ one, index }) => {
    const below = reaches(one) ? "" : ", does not count";
    const text = `${one.class} ${one.score.toFixed(2)}, ${one.area} px${below}`;
    return element("li", {}, toggle(text, index, reaches(one) ? "" : "below"));
  }));
}

// The strip

const passes = (item) => state.filter === "all" || keyOf(item) === state.filter;

function renderStrip() {
  for (const place of document.querySelectorAll("[data-count]")) {
    const name = place.dataset.count;
    place.textContent = state.items.filter((item) => name === "all" || keyOf(item) === name).length;
  }
  for (const button of document.querySelectorAll("[data-filter]"))
    button.setAttribute("aria-pressed", String(button.dataset.filter === state.filter));
  const shown = state.items.filter(passes).reverse(); // the newest first
  byId("strip").replaceChildren(...shown.map(tile));
}

function tile(item) {
  const key = keyOf(item);
  if (!item.tile || item.tile.dataset.key !== key) {
    const picture = element("img", { src: item.url, alt: "", loading: "lazy" });
    const button = element("button", { type: "button", title: item.name }, picture, element("span", { class: "file" }, item.name), badge(item));
    button.addEventListener("click", () => open(item));
    const hadFocus = item.tile?.contains(document.activeElement);
    item.tile = element("li", { "data-key": key }, button);
    if (hadFocus) queueMicrotask(() => button.focus());
  }
  item.tile.firstChild.setAttribute("aria-current", String(item === state.current));
  return item.tile;
}

function step(by) {
  const shown = state.items.filter(passes);
  const next = shown[shown.indexOf(state.current) + by];
  if (next) open(next);
}

// The camera

let stream = null;

async function startCamera() {
  byId("no-camera").hidden = true;
  byId("shot").showModal();
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment", width: { ideal: 4096 } } });
    byId("video").srcObject = stream;
  } catch (error) {
    byId("no-camera").textContent = `There is no picture: ${error.message}`;
    byId("no-camera").hidden = false;
  }
}

function takePicture() {
  const video = byId("video");
  if (!video.videoWidth) return;
  const canvas = element("canvas");
  canvas.width = video.videoWidth;
  canvas.height = video.videoHeight;
  canvas.getContext("2d").drawImage(video, 0, 0);
  const name = `camera ${new Date().toISOString().slice(0, 19).replaceAll(":", "-")}.png`;
  canvas.toBlob((blob) => add([new File([blob], name, { type: "image/png" })]), "image/png");
}

function stopCamera() {
  for (const track of stream?.getTracks() ?? []) track.stop();
  stream = null;
}

// Events

async function download(kind) {
  const { items, current, model } = state;
  if (kind === "json") save(json(items), "verdicts.json", "application/json");
  if (kind === "csv") save(csv(items), "verdicts.csv", "text/csv");
  if (kind === "coco") save(coco(items, model?.classes ?? []), "annotations.json", "application/json");
  if (kind === "png") {
    const content = await png(viewer.picture, viewer.outlines, viewer.size);
    save(content, `${current.name.replace(/\.\w+$/, "")}-defects.png`, "image/png");
  }
}

byId("choose").addEventListener("click", () => byId("files").click());
byId("files").addEventListener("change", (event) => { add(event.target.files); event.target.value = ""; });
byId("camera").hidden = !navigator.mediaDevices?.getUserMedia;
byId("camera").addEventListener("click", startCamera);
byId("take").addEventListener("click", takePicture);
byId("stop").addEventListener("click", () => byId("shot").close());
byId("shot").addEventListener("close", stopCamera);
byId("chosen").addEventListener("change", () => loadModel().catch(untilBack));
byId("threshold").addEventListener("input", (event) => { state.threshold = Number(event.target.value); render(); });
byId("reset").addEventListener("click", () => { state.threshold = state.model.threshold.value; render(); byId("threshold").focus(); });
byId("clear").addEventListener("click", () => {
  for (const item of state.items) forget(item);
  state.items = [];
  render();
});
for (const button of document.querySelectorAll("[data-filter]"))
  button.addEventListener("click", () => { state.filter = button.dataset.filter; renderStrip(); });
for (const button of document.querySelectorAll("[data-download]"))
  button.addEventListener("click", () => download(button.dataset.download));
addEventListener("keydown", (event) => {
  const steps = { PageUp: -1, PageDown: 1 };
  if (!steps[event.key] || document.querySelector("dialog[open]")) return;
  event.preventDefault();
  step(steps[event.key]);
});
for (const name of ["dragenter", "dragover"])
  addEventListener(name, (event) => { event.preventDefault(); document.body.classList.add("dropping"); });
addEventListener("dragleave", (event) => { if (!event.relatedTarget) document.body.classList.remove("dropping"); });
addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  add(event.dataTransfer.files);
});

render();
loadModel().catch(untilBack);
