// A canvas to draw on, by pointer or by keyboard. Tells when a stroke has ended.

const INKS = {
  black: "#000000", white: "#ffffff", red: "#e0242f", orange: "#f58220", yellow: "#ffd21f", green: "#2fa84f",
  blue: "#2563eb", purple: "#8b3fc7", brown: "#8a5a33",
};
const KEPT = 30;
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

/** Makes a canvas one to draw on; `changed` is called with it after each stroke. */
export function drawing(canvas, inks, width, undo, clear, changed) {
  const pen = canvas.getContext("2d", { willReadFrequently: true });
  const before = [];
  let ink = INKS.black;
  let last = null;
  let cursor = [canvas.width / 2, canvas.height / 2];
  let down = false;

  const blank = () => { pen.fillStyle = "#ffffff"; pen.fillRect(0, 0, canvas.width, canvas.height); };
  const keep = () => { before.push(pen.getImageData(0, 0, canvas.width, canvas.height)); if (before.length > KEPT) before.shift(); };
  const place = (event) => {
    const box = canvas.getBoundingClientRect();
    return [((event.clientX - box.left) * canvas.width) / box.width, ((event.clientY - box.top) * canvas.height) / box.height];
  };
  const line = (from, to) => {
    pen.strokeStyle = ink;
    pen.lineWidth = Number(width.value);
    pen.lineCap = pen.lineJoin = "round";
    pen.beginPath();
    pen.moveTo(...from);
    pen.lineTo(...to);
    pen.stroke();
  };

  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    keep();
    last = place(event);
    line(last, last);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (last === null) return;
    for (const one of event.getCoalescedEvents?.() ?? [event]) { const to = place(one); line(last, to); last = to; }
  });
  for (const end of ["pointerup", "pointercancel"]) {
    canvas.addEventListener(end, () => { if (last !== null) { last = null; changed(canvas); } });
  }

  canvas.addEventListener("keydown", (event) => {
    if (event.key in ARROWS) {
      event.preventDefault();
      const step = event.shiftKey ? 24 : 8;
      const to = ARROWS[event.key].map((way, axis) => Math.min(canvas.width, Math.max(0, cursor[axis] + way * step)));
      if (down) line(cursor, to);
      cursor = to;
    } else if (event.key === " ") {
      event.preventDefault();
      down = !down;
      if (down) { keep(); line(cursor, cursor); } else changed(canvas);
    } else if (event.key === "z" || event.key === "Z") undo.click();
  });

  undo.addEventListener("click", () => { if (before.length) { pen.putImageData(before.pop(), 0, 0); changed(canvas); } });
  clear.addEventListener("click", () => { keep(); blank(); down = false; });
  for (const [name, colour] of Object.entries(INKS)) {
    const one = document.createElement("button");
    one.type = "button";
    one.setAttribute("aria-pressed", String(colour === ink));
    one.setAttribute("aria-label", name);
    one.title = name;
    one.style.background = colour;
    one.addEventListener("click", () => {
      ink = colour;
      for (const other of inks.children) other.setAttribute("aria-pressed", String(other === one));
    });
    inks.append(one);
  }
  blank();
}
