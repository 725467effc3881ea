// Patches and words in the colours of their experts, with a legend of shares. Pointing at an expert shows it alone.

const NOBODY = -1;
let routing = [], views = [], colours = [], chosen = "", alone = null, drawn = 0;

const at = (id) => document.getElementById(id);
const said = (expert) => (expert === NOBODY ? "no expert" : `expert ${expert}`);

/** Shows the routing of an answer: its layers, or a sentence where it has none. */
export function showExperts(answer, palette) {
  colours = palette;
  views = answer.views ?? [];
  const why = answer.routing.why;
  routing = why ? [] : answer.routing;
  at("experts").hidden = Boolean(why) && !views.length; // a sentence alone may have no experts: nothing is missing then
  at("routing-trouble").hidden = !why;
  at("routing-trouble").textContent = why ?? "";
  const last = routing.findLast((one) => one.patches.length) ?? routing.at(-1);
  if (!routing.some((one) => one.layer === chosen)) chosen = last?.layer ?? "";
  alone = null;
  at("layers").replaceChildren(...(routing.length > 1 ? routing.map(layerButton) : []));
  draw();
}

function layerButton(layer) {
  const one = document.createElement("button");
  one.type = "button";
  one.setAttribute("aria-pressed", String(layer.layer === chosen));
  one.textContent = layer.layer;
  one.addEventListener("click", () => {
    chosen = layer.layer;
    for (const other of at("layers").children) other.setAttribute("aria-pressed", String(other === one));
    draw();
  });
  return one;
}

async function draw() {
  const mine = ++drawn;
  const layer = routing.find((one) => one.layer === chosen);
  const maps = layer ? await Promise.all(pairs(layer.patches).map(([view, grid]) => map(view, grid))) : [];
  if (mine !== drawn) return;
  at("maps").classList.toggle("several", maps.length > 1);
  at("maps").replaceChildren(...maps);
  const reader = layer?.words.length ? layer : routing.findLast((one) => one.words.length);
  at("words").replaceChildren(...(reader && reader !== layer ? [`${reader.layer}: `] : []), ...(reader?.words ?? []).map(word));
  at("legend").replaceChildren(...(layer ? legend(layer) : []));
}

/** A grid of patches for each picture that is shown. */
function pairs(grids) {
  const shown = Math.min(views.length, grids.length);
  return [...Array(shown).keys()].map((i) => [
    views[Math.floor(((2 * i + 1) * views.length) / (2 * shown))],
    grids[Math.floor(((2 * i + 1) * grids.length) / (2 * shown))],
  ]);
}

async function map(view, grid) {
  const picture = new Image();
  picture.src = view;
  await picture.decode();
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 2 * picture.width;
  const pen = canvas.getContext("2d");
  pen.drawImage(picture, 0, 0, canvas.width, canvas.height);
  const high = canvas.height / grid.length, wide = canvas.width / grid[0].length;
  pen.font = `600 ${Math.min(28, Math.round(high / 3))}px system-ui, sans-serif`;
  pen.textBaseline = "top";
  grid.forEach((row, y) => row.forEach((expert, x) => {
    const other = alone !== null && expert !== alone;
    pen.globalAlpha = other ? 0.82 : 0.5;
    pen.fillStyle = other || expert === NOBODY ? "#808080" : colours[expert % colours.length];
    pen.fillRect(x * wide, y * high, wide, high);
    pen.globalAlpha = 1;
    pen.strokeStyle = "rgb(255 255 255 / 55%)";
    pen.strokeRect(x * wide, y * high, wide, high);
    if (high < 36 || other) return;
    pen.fillStyle = "#ffffff";
    pen.strokeStyle = "rgb(0 0 0 / 60%)";
    pen.lineWidth = 4;
    const text = expert === NOBODY ? "-" : String(expert);
    pen.strokeText(text, x * wide + 7, y * high + 7);
    pen.fillText(text, x * wide + 7, y * high + 7);
    pen.lineWidth = 1;
  }));
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `Expert of each patch, row by row: ${grid.map((row) => row.map((one) => (one === NOBODY ? "none" : one)).join(" ")).join("; ")}`);
  return canvas;
}

function word({ word: text, expert }) {
  const chip = document.createElement("span");
  chip.className = alone !== null && expert !== alone ? "word dim" : "word";
  if (expert !== NOBODY) chip.style.setProperty("--expert", colours[expert % colours.length]);
  chip.title = said(expert);
  const number = document.createElement("small");
  number.textContent = expert === NOBODY ? "none" : String(expert);
  number.setAttribute("aria-label", said(expert));
  chip.append(text, " ", number);
  return chip;
}

function legend(layer) {
  const most = Math.max(...layer.shares, layer.nobody);
  const rows = layer.shares.map((share, expert) => [expert, share]);
  if (layer.nobody > 0) rows.push([NOBODY, layer.nobody]);
  return rows.map(([expert, share]) => {
    const row = document.createElement("li"), one = document.createElement("button");
    one.type = "button";
    one.setAttribute("aria-pressed", String(alone === expert));
    one.style.setProperty("--expert", expert === NOBODY ? "#808080" : colours[expert % colours.length]);
    const name = document.createElement("span"), track = document.createElement("span"), bar = document.createElement("i"), part = document.createElement("span");
    name.textContent = said(expert);
    bar.style.width = `${most ? (100 * share) / most : 0}%`;
    track.append(bar);
    part.textContent = `${Math.round(100 * share)} %`;
    one.append(document.createElement("b"), name, track, part);
    one.addEventListener("click", () => { alone = alone === expert ? null : expert; draw(); });
    row.append(one);
    return row;
  });
}
