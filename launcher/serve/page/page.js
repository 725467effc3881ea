// Sends what is typed, drawn or chosen, and shows the answers. While one request is under way only the newest waits.

import { drawing } from "./drawing.js";
import { showExperts } from "./experts.js";

const at = (id) => document.getElementById(id);
const TYPING_PAUSE = 200; // milliseconds
const STILL = matchMedia("(prefers-reduced-motion: reduce)").matches;
const THEMES = ["system", "light", "dark"];
let about = { colours: [] };
let busy = false, waiting = null, last = null;

async function ask(path, options) {
  let reply;
  try {
    reply = await fetch(path, options);
  } catch {
    throw new Error("The server does not answer: is omnivl serve still running?");
  }
  if (reply.status === 503) throw new Error("The server is busy; try again in a moment.");
  const answer = await reply.json();
  if (!reply.ok) throw new Error(answer.error);
  return answer;
}

const asJson = (body) => ({ method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });

/** Asks now, or as soon as the request under way is answered; of several that wait only the newest is asked. */
async function submit(send) {
  last = send;
  if (busy) { waiting = send; return; }
  busy = true;
  at("status").textContent = "Thinking ...";
  document.body.setAttribute("aria-busy", "true");
  const begun = performance.now();
  try {
    const answer = await send();
    at("trouble").hidden = true;
    show(answer);
    at("status").textContent = `Answered in ${((performance.now() - begun) / 1000).toFixed(2)} s.`;
  } catch (error) {
    at("trouble").textContent = error.message;
    at("trouble").hidden = false;
    at("status").textContent = "";
  }
  busy = false;
  document.body.removeAttribute("aria-busy");
  if (waiting !== null) { const next = waiting; waiting = null; submit(next); }
}

function chosenLabels() {
  const labels = at("labels").value.split(/[,\n]/).map((one) => one.trim()).filter(Boolean);
  return labels.length ? labels : null;
}

const askText = (text) => submit(() => ask("/api/text", asJson({ text })));
const askSample = (number) => submit(() => ask("/api/sample", asJson({ number, labels: chosenLabels() })));
function askPicture(blob) {
  submit(() => {
    const labels = new URLSearchParams((chosenLabels() ?? []).map((label) => ["label", label]));
    const type = /^(image|video)\//.test(blob.type) ? blob.type : "application/octet-stream";
    return ask(`/api/picture?${labels}`, { method: "POST", headers: { "Content-Type": type }, body: blob });
  });
}

function show(answer) {
  const seen = answer.views !== undefined;
  at("told").hidden = !seen;
  if (seen) {
    at("asked").replaceChildren(...answer.views.map((source) => picture(source, answer.media === "video" ? "a frame of the clip" : "the picture, as the model sees it")));
    const why = answer.caption.why;
    at("caption").textContent = why ?? (answer.caption || "(an empty caption)");
    at("caption").classList.toggle("soft", Boolean(why));
    at("shares").replaceChildren(...(answer.labels.why ? [sentence(answer.labels.why)] : answer.labels.map(bar)));
  }
  showExperts(answer, about.colours);
  at("found").hidden = false;
  const why = answer.results.why;
  at("found-trouble").hidden = !why;
  at("found-trouble").textContent = why ?? "";
  at("found-title").textContent = seen ? "Nearest pictures and clips" : "Pictures and clips for this sentence";
  at("results").replaceChildren(...(why ? [] : answer.results.map(result)));
}

function picture(source, text) {
  const one = new Image();
  one.src = source;
  one.alt = text;
  return one;
}

function sentence(text) {
  const one = document.createElement("p");
  one.className = "soft";
  one.textContent = text;
  return one;
}

function bar({ label, share }) {
  const row = document.createElement("div"), name = document.createElement("span"), track = document.createElement("span"), inner = document.createElement("i"), part = document.createElement("span");
  row.className = "bar";
  name.textContent = name.title = label;
  inner.style.width = `${100 * share}%`;
  track.append(inner);
  part.textContent = `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`;
  row.append(name, track, part);
  return row;
}

function result({ number, score, media, caption, label, key }, rank) {
  const row = document.createElement("li"), one = document.createElement("button"), name = document.createElement("span"), small = document.createElement("small");
  const told = caption || label || key;
  one.type = "button";
  one.title = `${told}: look at this one`;
  name.textContent = told;
  small.textContent = `${rank + 1}. ${score.toFixed(3)}${media === "video" ? ", clip" : ""}`;
  const shown = picture(`/api/${media === "video" && !STILL ? "animation" : "thumbnail"}/${number}`, told);
  shown.loading = "lazy";
  one.append(shown, name, small);
  one.addEventListener("click", () => { askSample(number); at("answer").focus({ preventScroll: true }); scrollTo({ top: 0, behavior: STILL ? "auto" : "smooth" }); });
  row.append(one);
  return row;
}

function example(text) {
  const one = document.createElement("button");
  one.type = "button";
  one.textContent = one.title = text;
  one.addEventListener("click", () => { at("sentence").value = text; askText(text); });
  return one;
}

function chooseTheme(name) {
  at("theme").textContent = `Theme: ${name}`;
  if (name === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  localStorage.setItem("theme", name);
}

let typed;
at("sentence").addEventListener("input", (event) => { clearTimeout(typed); const text = event.target.value; if (text.trim()) typed = setTimeout(() => askText(text), TYPING_PAUSE); });
at("sentence").addEventListener("keydown", (event) => { if (event.key === "Enter") { clearTimeout(typed); askText(event.target.value); } });
at("file").addEventListener("change", (event) => { if (event.target.files[0]) askPicture(event.target.files[0]); event.target.value = ""; });
at("labels").addEventListener("change", () => { if (last !== null) submit(last); });
addEventListener("dragover", (event) => { event.preventDefault(); at("drop").classList.add("over"); });
addEventListener("dragleave", () => at("drop").classList.remove("over"));
addEventListener("drop", (event) => { event.preventDefault(); at("drop").classList.remove("over"); const file = event.dataTransfer.files[0]; if (file) askPicture(file); });
addEventListener("paste", (event) => { const file = event.clipboardData.files[0]; if (file) { event.preventDefault(); askPicture(file); } });
at("theme").addEventListener("click", () => chooseTheme(THEMES[(THEMES.indexOf(localStorage.getItem("theme") ?? "system") + 1) % THEMES.length]));
chooseTheme(localStorage.getItem("theme") ?? "system");
drawing(at("canvas"), at("inks"), at("width"), at("undo"), at("clear"), (canvas) => canvas.toBlob(askPicture, "image/png"));

ask("/api/about", {}).then((told) => {
  about = told;
  const counts = [told.counts.image && `${told.counts.image.toLocaleString()} pictures`, told.counts.video && `${told.counts.video.toLocaleString()} clips`].filter(Boolean).join(" and ");
  const step = told.step === null ? "" : `, step ${told.step.toLocaleString()}`;
  at("about").textContent = `${told.run}, stage ${told.stage}${step}; searches ${counts}: ${told.gallery}${told.left_out ? `; ${told.left_out} could not be read` : ""}`;
  document.title = `Try ${told.run}`;
  at("labels").placeholder = told.labels.slice(0, 40).join(", ");
  at("examples").replaceChildren(...told.examples.map(example));
}, (error) => { at("about").textContent = error.message; });
