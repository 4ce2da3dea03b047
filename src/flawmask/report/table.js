"use strict";
// The table of all images, for reports with many. Its rows are in files beside the page, one script for each part. They
// are loaded one after the other when the button is pressed. Only the rows of one leaf are on the page at a time.
{
  const LEAF = 100; // rows on the page
  const OUTCOMES = ["right", "right", "missed", "false alarm"];
  const DEFECTIVE = [false, true, true, false];
  const table = JSON.parse(document.getElementById("table-data").textContent);
  const at = (name) => document.getElementById(`table-${name}`);
  const files = [];
  const types = [];
  const outcomes = [];
  const scores = [];
  let chosen = new Uint32Array(0);
  let leaf = 0;
  let timer = 0;

  function load(number) {
    if (number === table.parts) {
      at("load").hidden = true;
      document.getElementById("table").hidden = false;
      choose();
      return;
    }
    document.getElementById("load").textContent = `Loading ${number + 1} of ${table.parts}`;
    const script = document.createElement("script");
    script.src = `${table.folder}/${number}.js`;
    script.onload = () => { script.remove(); load(number + 1); };
    script.onerror = () => { at("load").textContent = `${script.src} cannot be read: keep the folder beside this page.`; };
    document.head.append(script);
  }

  window.flawmaskRows = (_, part) => {
    for (const one of part.files) files.push(one);
    for (const one of part.types) types.push(one);
    for (const one of part.outcomes) outcomes.push(one);
    for (const one of part.scores) scores.push(one);
  };

  function choose() {
    const name = at("name").value.toLowerCase();
    const [type, outcome] = [at("type").value, at("outcome").value];
    const [low, high] = [Number(at("low").value), Number(at("high").value)];
    const found = [];
    for (let row = 0; row < files.length; row += 1)
      if (scores[row] >= low && scores[row] <= high
          && (type === "" || types[row] === Number(type))
          && (outcome === "" || outcomes[row] === Number(outcome))
          && (name === "" || files[row].toLowerCase().includes(name))) found.push(row);
    chosen = Uint32Array.from(found);
    const sign = { rising: 1, falling: -1 }[at("order").value];
    if (sign) chosen.sort((one, other) => sign * (scores[one] - scores[other]) || one - other);
    leaf = 0;
    show();
  }

  function show() {
    const first = leaf * LEAF;
    const rows = [...chosen.subarray(first, first + LEAF)].map((row) => {
      const made = document.createElement("tr");
      const truth = DEFECTIVE[outcomes[row]] ? table.types[types[row]] : "good";
      const cells = [files[row], truth, OUTCOMES[outcomes[row]], scores[row].toFixed(4)];
      for (const [place, text] of cells.entries()) {
        const cell = document.createElement(place ? "td" : "th");
        if (!place) cell.scope = "row";
        cell.textContent = text;
        made.append(cell);
      }
      return made;
    });
    at("rows").replaceChildren(...rows);
    const last = first + rows.length;
    at("count").textContent = rows.length
      ? `${first + 1} to ${last} of ${chosen.length} of ${files.length} images` : `none of ${files.length} images`;
    at("back").disabled = !leaf;
    at("next").disabled = last >= chosen.length;
  }

  document.getElementById("load").addEventListener("click", (event) => { event.target.disabled = true; load(0); });
  // Not at each letter: with a million rows, this takes a moment.
  const chooseSoon = () => { clearTimeout(timer); timer = setTimeout(choose, 150); };
  for (const name of ["name", "type", "outcome", "low", "high", "order"]) at(name).addEventListener("input", chooseSoon);
  at("back").addEventListener("click", () => { leaf -= 1; show(); });
  at("next").addEventListener("click", () => { leaf += 1; show(); });
}
