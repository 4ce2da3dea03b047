// What can be downloaded: the answers as JSON, CSV and COCO, and the shown image with its outlines as PNG.
import { drawing } from "/viewer.js";

const answered = (items) => items.filter((item) => item.answer);

const records = (items) =>
  answered(items).map(({ name, answer, model }) => ({ ...answer, file: name, model: model.model, sha256: model.sha256, threshold: model.threshold }));

// A cell that begins like a formula would be computed by a spreadsheet.
function cell(value) {
  const text = value === null || value === undefined ? "" : String(value);
  const safe = typeof value === "string" && /^[=+\-@\t\r]/.test(text) ? `'${text}` : text;
  return /[",\r\n]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
}

export function csv(items) {
  const columns = ["file", "verdict", "reason", "score", "instances", "defect_area_px", "defect_area_percent", "defect_probability", "model", "threshold"];
  const rows = records(items).map((one) => ({
    ...one,
    verdict: one.verdict ?? "no verdict",
    instances: one.instances ? one.instances.filter((each) => each.counts).length : "",
  }));
  const lines = [columns, ...rows.map((row) => columns.map((name) => row[name]))];
  return `\ufeff${lines.map((line) => line.map(cell).join(",")).join("\r\n")}\r\n`;
}

export const json = (items) => `${JSON.stringify({ images: records(items) }, null, 2)}\n`;

// COCO's format of data sets. Only what counts is an annotation, and only images with a verdict are listed. The categories
// are the classes of the model in use, and those of others that some images were sent to.
export function coco(items, own) {
  const classes = [...new Set([...own, ...answered(items).flatMap(({ answer }) => answer.instances ?? []).map((one) => one.class)])];
  const images = [];
  const annotations = [];
  for (const { name, answer } of answered(items).filter((item) => item.answer.verdict !== null)) {
    const { width, height } = answer;
    images.push({ id: images.length + 1, file_name: name, width, height });
    for (const one of answer.instances.filter((each) => each.counts))
      annotations.push({
        id: annotations.length + 1, image_id: images.length, category_id: classes.indexOf(one.class) + 1,
        bbox: one.box, area: one.area, segmentation: one.segmentation ?? [], iscrowd: 0, score: one.score,
      });
  }
  const categories = classes.map((name, index) => ({ id: index + 1, name }));
  return `${JSON.stringify({ images, annotations, categories }, null, 2)}\n`;
}

// The image at full resolution with the outlines that are shown, as a PNG.
export async function png(picture, outlines, size) {
  const canvas = document.createElement("canvas");
  canvas.width = size.width;
  canvas.height = size.height;
  const context = canvas.getContext("2d");
  context.drawImage(picture, 0, 0, size.width, size.height);
  const line = Math.max(1, Math.max(size.width, size.height) / 500);
  context.lineJoin = "round";
  for (const path of outlines.querySelectorAll("path:not(.rim)")) {
    const shape = new Path2D();
    const quarter = drawing("svg", {}).createSVGMatrix().scale(0.25);
    shape.addPath(new Path2D(path.getAttribute("d")), quarter);
    for (const [colour, width] of [["#000000", 2 * line], ["#d55e00", line]]) {
      context.strokeStyle = colour;
      context.lineWidth = width;
      context.stroke(shape);
    }
  }
  return new Promise((done) => canvas.toBlob(done, "image/png"));
}

export function save(content, name, type) {
  const url = URL.createObjectURL(new Blob([content], { type }));
  const link = document.createElement("a");
  link.href = url;
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
