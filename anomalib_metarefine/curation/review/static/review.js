"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const grid = $("grid");
  let client = crypto.getRandomValues(new Uint32Array(3)).join("-");
  try { client = (sessionStorage.client ??= client); } catch { /* storage may be forbidden, as inside a notebook */ }
  const trail = []; // answers given here, for undo: page, image, decision before
  const asides = []; // pages left for look-alikes
  let page = null;
  let chain = Promise.resolve(); // keys are acted on one after the other, each once the answer before is on the disk

  function queue(act) {
    chain = chain.then(act).catch((error) => { // one key that fails must not make all others dead
      $("trouble").textContent = `This page has failed (${error.message}). Reload it; all answers are on the disk.`;
      $("trouble").hidden = false;
    });
  }

  const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

  async function post(what, body) {
    for (;;) {
      try {
        const response = await fetch(`do/${what}`, {
          method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ client, ...body }),
        });
        if (!response.ok) throw new Error(`the server refused: ${await response.text()}`);
        $("trouble").hidden = true;
        return await response.json();
      } catch (error) {
        $("trouble").textContent =
          `Not saved, trying again: ${error.message}. If the server was stopped, start metarefine review again and open its new address; all earlier answers are on the disk.`;
        $("trouble").hidden = false;
        await pause(1000);
      }
    }
  }

  function make(tag, properties = {}, ...children) {
    const { data, ...others } = properties;
    const element = Object.assign(document.createElement(tag), others);
    Object.assign(element.dataset, data);
    element.append(...children);
    return element;
  }

  function picture(card, kind, alt, withMap) {
    const image = make("img", { src: `image/${card.index}/${kind}`, alt, decoding: "async" });
    const holder = make("div", {}, image);
    const frame = make("div", { className: "frame" }, holder);
    image.addEventListener("load", () => {
      const ratio = image.naturalWidth / image.naturalHeight;
      if (kind === "small") frame.closest(".card").classList.toggle("wide", ratio > 2.2);
      if (withMap) holder.append(make("img", { className: "map", src: `image/${card.index}/map`, alt: "" }));
    });
    image.addEventListener("error", async () => {
      const answer = await fetch(image.src).catch(() => null);
      holder.replaceChildren(make("p", { textContent: answer ? await answer.text() : "No picture." }));
    });
    return frame;
  }

  function drawn(card) {
    const beside = make("div", { className: "beside" });
    if (card.nearest) {
      const caption = make("figcaption", { textContent: `nearest kept: ${card.nearest.split("/").pop()}` });
      beside.append(make("figure", {}, picture(card, "nearest", `Nearest kept image: ${card.nearest}`, false), caption));
    }
    const facts = [card.score === null ? "" : `score ${card.score.toFixed(1)}`, card.copies > 1 ? `${card.copies} copies` : "", card.quality];
    const actions = make("div", { className: "actions" },
      make("button", { type: "button", data: { do: "keep" } }, "Keep ", make("kbd", { textContent: "K" })),
      make("button", { type: "button", data: { do: "reject" } }, "Reject ", make("kbd", { textContent: "R" })));
    for (const [name, key, count, text] of [["alike", "L", card.alike, "alike"], ["variant", "V", card.variant, "of this variant"]]) {
      if (count > 1) actions.append(make("button", { type: "button", data: { do: name }, title: "Show them together" }, `${count} ${text} `, make("kbd", { textContent: key })));
    }
    beside.append(make("p", { className: "name", textContent: card.path, title: card.path }),
      make("p", { className: "facts", textContent: facts.filter(Boolean).join(" · ") }));
    const pictures = make("div", { className: "pictures" }, picture(card, "small", card.path, card.map), beside);
    const item = make("li", { className: "card", tabIndex: -1, data: { index: card.index } }, pictures, actions);
    mark(item, card.decision);
    return item;
  }

  function mark(item, decision) {
    item.dataset.decision = decision;
    for (const button of item.querySelectorAll("[data-do=keep], [data-do=reject]")) button.setAttribute("aria-pressed", button.dataset.do === decision);
  }

  const cards = () => [...grid.children];
  const open = () => cards().filter((item) => !item.dataset.decision);
  const current = () => document.activeElement.closest?.(".card") ?? cards()[0];
  const focus = (item) => { item?.focus({ preventScroll: true }); item?.scrollIntoView({ block: "nearest" }); };

  function count() {
    $("place").textContent = page ? `${cards().length - open().length} of ${cards().length} on this page` : "";
  }

  function stand(s) {
    const left = s.about === null ? ["left:", "not known yet", ""] : ["left about", Math.round(s.about), `(at most ${s.at_most}, 95 %)`];
    const parts = [["Looked at", s.looked, `of ${s.total}`], ["found", s.found, ""], left];
    const spans = parts.map(([before, number, after]) => make("span", {}, `${before} `, make("b", { textContent: number }), ` ${after}`));
    $("standing").replaceChildren(...spans.flatMap((span, i) => (i ? [" · ", span] : [span])));
    $("bad").style.width = `${(100 * s.found) / s.total}%`;
    $("good").style.width = `${(100 * (s.looked - s.found)) / s.total}%`;
    $("verdict").textContent = (s.stop ? "You can stop. " : "") + s.reason;
    $("verdict").classList.toggle("stop", s.stop);
  }

  function show(state) {
    stand(state.standing);
    page = state.page;
    $("end").hidden = page !== null;
    $("title").hidden = !page || page.kind === "order";
    $("title").textContent = { alike: "Images of one kind: G keeps all of them, B rejects all of them", chosen: "Images from the map" }[page?.kind] ?? "Left undecided before";
    grid.replaceChildren(...(page ? page.cards.map(drawn) : []));
    for (const button of document.querySelectorAll("footer button:not([data-do=undo])")) button.disabled = !page;
    history.replaceState(null, "", page ? `#${page.number}` : "#");
    window.scrollTo(0, 0);
    focus(open()[0] ?? cards()[0]);
    count();
    for (const index of state.soon) new Image().src = `image/${index}/small`;
  }

  async function save(items, decision) {
    const decisions = Object.fromEntries(items.map((item) => [item.dataset.index, decision]));
    const { standing } = await post("answer", { decisions });
    for (const item of items) mark(item, decision);
    stand(standing);
    count();
  }

  async function decide(item, decision) {
    if (!item) return;
    const before = item.dataset.decision;
    await save([item], decision);
    trail.push({ page: page.number, items: [[item.dataset.index, before]] });
    const all = cards();
    const place = all.indexOf(item);
    focus([...all.slice(place + 1), ...all.slice(0, place)].find((other) => !other.dataset.decision) ?? item);
  }

  async function rest(decision) {
    const items = open();
    if (items.length) {
      await save(items, decision);
      trail.push({ page: page.number, items: items.map((item) => [item.dataset.index, ""]) });
    }
    await next();
  }

  async function next() {
    if (!page) return;
    const back = asides.pop();
    show(back === undefined ? await post("next", {}) : await post("page", { number: back }));
  }

  async function undo() {
    const last = trail.pop();
    if (!last) return;
    if (page && page.number !== last.page) asides.push(page.number);
    if (page?.number !== last.page) show(await post("page", { number: last.page }));
    for (const [index, before] of last.items) await save([grid.querySelector(`[data-index="${index}"]`)], before);
    focus(grid.querySelector(`[data-index="${last.items[0][0]}"]`));
  }

  async function aside(what, body) {
    const state = await post(what, body);
    if (!state.page) return; // somebody else has decided them
    if (page) asides.push(page.number);
    show(state);
  }

  async function alike(item, by) {
    if (item?.querySelector(`[data-do=${by === "look" ? "alike" : "variant"}]`)) await aside("alike", { index: Number(item.dataset.index), by });
  }

  async function finish() {
    $("said").textContent = "One moment: manifest and report are being written.";
    $("next").hidden = true;
    $("done").showModal();
    const state = await post("finish", {});
    $("next").hidden = false;
    $("said").textContent = state.verdict;
    $("written").textContent = state.written.join(", ");
    $("commands").textContent = state.commands.join("\n");
  }

  async function all() {
    $("all").showModal();
    window.plane.draw(await post("map", {}), (images) => {
      $("all").close();
      queue(() => aside("chosen", { images }));
    });
  }

  function full(item) {
    if (!item) return;
    const [image, map] = $("full").querySelectorAll("img");
    image.src = `image/${item.dataset.index}/full`;
    image.onload = () => $("full").style.setProperty("--ratio", image.naturalWidth / image.naturalHeight);
    image.alt = item.querySelector(".name").textContent;
    const heat = item.querySelector(".map");
    map.hidden = !heat;
    if (heat) map.src = heat.src;
    $("full").querySelector("span").textContent = image.alt;
    $("full").classList.remove("pixels");
    $("full").showModal();
  }

  function maps() {
    const on = document.body.classList.toggle("maps");
    document.querySelector("footer [data-do=map]").setAttribute("aria-pressed", on);
  }

  function move(step) {
    const all = cards();
    const item = current();
    if (Math.abs(step) === 1) return focus(all[all.indexOf(item) + step]);
    const box = item.getBoundingClientRect();
    const ahead = all.map((other) => [other, other.getBoundingClientRect()]).filter(([, b]) => (step > 0 ? b.top >= box.bottom : b.bottom <= box.top));
    const nearness = ([, b]) => Math.abs(b.top - box.top) * 4 + Math.abs(b.left - box.left);
    return focus(ahead.sort((a, b) => nearness(a) - nearness(b))[0]?.[0]);
  }

  const acts = {
    keep: (item) => decide(item, "keep"), reject: (item) => decide(item, "reject"), undo, next, full, map: maps,
    alike: (item) => alike(item, "look"), variant: (item) => alike(item, "variant"), all, finish,
    good: () => rest("keep"), bad: () => rest("reject"), help: () => $("keys").showModal(),
    close: () => document.querySelector("dialog[open]")?.close(),
  };
  const keys = {
    k: "keep", r: "reject", u: "undo", backspace: "undo", " ": "next", g: "good", b: "bad", l: "alike", v: "variant", a: "all", e: "finish", f: "full", m: "map", "?": "help",
  };
  const steps = { arrowleft: -1, arrowright: 1, arrowup: -2, arrowdown: 2 };
  const act = (name, item) => queue(() => acts[name](item ?? current()));

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
    const key = event.key.toLowerCase();
    const dialog = document.querySelector("dialog[open]");
    const name = keys[key];
    if (dialog ? !["keep", "reject", "map"].includes(name) || dialog.id !== "full" : !name && !steps[key]) return;
    if (key === " " && document.activeElement.matches("button")) return; // the button's own key
    event.preventDefault();
    if (dialog && name !== "map") dialog.close();
    if (name) act(name);
    else queue(() => move(steps[key]));
  });
  document.addEventListener("click", (event) => {
    const button = event.target.closest("[data-do]");
    const item = event.target.closest(".card");
    if (event.target.matches("#full .stage img")) $("full").classList.toggle("pixels");
    else if (button) act(button.dataset.do, item);
    else if (event.target.matches(".card img")) act("full", item);
    else if (item) focus(item);
  });
  queue(async () => show(await post("page", { number: Number(location.hash.slice(1) || -1) })));
})();
