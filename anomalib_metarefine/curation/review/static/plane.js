"use strict";
// The map of all images: a point each, coloured by what is asked for, and a lasso.
window.plane = (() => {
  const $ = (id) => document.getElementById(id);
  const canvas = $("plane");
  const margin = 12;
  let state, chosen, path = [];

  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const variants = ["#8b969f", "#e69f00", "#56b4e9", "#009e73", "#cc79a7", "#d55e00"]; // Okabe and Ito's

  function colours() {
    const by = $("colour").value;
    const named = { reject: style("--reject"), keep: style("--keep"), "": style("--edge") };
    $("legend").textContent = { score: "from grey, low, to red, high", decision: "red: rejected, blue: kept, grey: no answer", variant: "grey: the largest" }[by];
    if (by === "decision") return state.decision.map((d) => named[d]);
    if (by === "variant") return state.variant.map((v) => variants[v % variants.length]);
    return state.score.map((s) => `hsl(${20 - 10 * s} ${Math.round(100 * s ** 3)}% ${Math.round(65 - 15 * s)}%)`);
  }

  const at = ([x, y]) => [margin + x * (canvas.clientWidth - 2 * margin), margin + (1 - y) * (canvas.clientHeight - 2 * margin)];

  function paint() {
    const ratio = window.devicePixelRatio;
    canvas.width = canvas.clientWidth * ratio;
    canvas.height = canvas.clientHeight * ratio;
    const pen = canvas.getContext("2d");
    pen.scale(ratio, ratio);
    const colour = colours();
    const order = state.score.map((_, i) => i).sort((a, b) => state.score[a] - state.score[b]); // suspicious ones on top
    for (const i of order) {
      pen.beginPath();
      pen.arc(...at(state.places[i]), 4, 0, 7);
      pen.fillStyle = colour[i];
      pen.fill();
    }
    if (path.length < 2) return;
    pen.beginPath();
    for (const point of path) pen.lineTo(...point);
    pen.closePath();
    pen.strokeStyle = style("--ink");
    pen.stroke();
  }

  function inside([x, y]) {
    let within = false;
    path.forEach(([ax, ay], i) => {
      const [bx, by] = path[(i || path.length) - 1];
      if (ay > y !== by > y && x < ((bx - ax) * (y - ay)) / (by - ay) + ax) within = !within;
    });
    return within;
  }

  const place = (event) => [event.offsetX, event.offsetY];

  function nearest([x, y]) {
    const far = state.places.map((p) => Math.hypot(at(p)[0] - x, at(p)[1] - y));
    const best = far.indexOf(Math.min(...far));
    return far[best] < 8 ? state.names[best] : "";
  }

  canvas.addEventListener("pointerdown", (event) => {
    if (!state?.places.length) return;
    canvas.setPointerCapture(event.pointerId);
    path = [place(event)];
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!state?.places.length) return;
    if (!path.length) $("under").textContent = nearest(place(event));
    else if (path.push(place(event))) paint();
  });
  canvas.addEventListener("pointerup", () => {
    const found = path.length > 2 ? state.places.flatMap((p, i) => (inside(at(p)) ? [i] : [])) : [];
    path = [];
    if (found.length) chosen(found.sort((a, b) => state.score[b] - state.score[a]));
    else if (state?.places.length) paint();
  });
  canvas.addEventListener("pointercancel", () => { path = []; });
  $("colour").addEventListener("change", () => state?.places.length && paint());
  window.addEventListener("resize", () => $("all").open && state?.places.length && paint());

  return {
    draw(found, then) {
      [state, chosen, path] = [found, then, []];
      $("under").textContent = "";
      if (state.places.length) paint();
      else $("under").textContent = "The curation stored no features of these images. Run metarefine curate again.";
    },
  };
})();
