"use strict";
(() => {
  const key = `metarefine answers ${document.body.dataset.key}`;
  const dialog = document.getElementById("compare");
  const cards = [...document.querySelectorAll(".card")];
  const choices = [...document.querySelectorAll(".choice")]; // an image may stand in two places
  const answers = new Map(stored()); // by path: decision, sha256 and when
  let current = 0;

  function stored() {
    try { return JSON.parse(localStorage.getItem(key)) ?? []; } catch { return []; } // storage may be forbidden
  }

  function keep() {
    try { localStorage.setItem(key, JSON.stringify([...answers])); } catch { /* then they last as long as the page */ }
  }

  function press(holder, decision) {
    for (const b of holder.querySelectorAll("[data-choice]")) b.setAttribute("aria-pressed", decision !== "" && b.dataset.choice === decision);
  }

  function update() {
    for (const holder of choices) {
      const decision = answers.get(holder.dataset.path)?.decision ?? "";
      press(holder, decision);
      const card = holder.closest(".card");
      if (card) card.dataset.decision = decision;
    }
    document.getElementById("decided").textContent = answers.size === 1 ? "1 image decided" : `${answers.size} images decided`;
    document.getElementById("download").disabled = answers.size === 0;
  }

  function decide(holders, decision) {
    const when = new Date().toISOString().replace(/\.\d+Z$/, "+00:00");
    for (const { dataset } of holders) {
      if (decision) answers.set(dataset.path, { sha256: dataset.sha, decision, when });
      else answers.delete(dataset.path);
    }
    keep();
    update();
  }

  function download() {
    const field = (text) => (/[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
    const rows = [...answers].map(([path, a]) => [path, a.sha256, a.decision, a.when, ""]);
    const lines = [["image_path", "sha256", "decision", "when", "by"], ...rows].map((row) => row.map(field).join(","));
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([lines.join("\n") + "\n"], { type: "text/csv" }));
    // Not decisions.csv: that is the memory of all answers in the curation's folder.
    link.download = `answers-${new Date().toISOString().slice(0, 16).replace(/[-:]/g, "")}.csv`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  function show(index) {
    current = index;
    const card = cards[current];
    dialog.querySelector("h2").textContent = card.querySelector("h4").textContent;
    dialog.querySelector("#place").textContent = `${current + 1} of ${cards.length}`;
    dialog.querySelector(".facts").replaceWith(card.querySelector(".facts").cloneNode(true));
    const pictures = card.querySelector(".pictures").cloneNode(true);
    pictures.classList.toggle("wide", card.classList.contains("wide"));
    dialog.querySelector(".pictures").replaceWith(pictures);
    const now = card.dataset.decision;
    press(dialog, now);
    dialog.querySelector("[data-step='-1']").disabled = current === 0;
    dialog.querySelector("[data-step='1']").disabled = current === cards.length - 1;
    if (!dialog.open) {
      dialog.showModal();
      dialog.querySelector("h2").focus(); // the first button stands below the pictures: focus there scrolls past them
    }
    dialog.scrollTop = 0;
  }

  function step(by) {
    const next = current + by;
    if (next >= 0 && next < cards.length) show(next);
  }

  function decideCurrent(decision) {
    decide([cards[current].querySelector(".choice")], decision);
    if (decision && current < cards.length - 1) return show(current + 1);
    show(current);
    if (decision) dialog.querySelector("#place").textContent = "That was the last image.";
  }

  document.addEventListener("click", (event) => {
    const pressed = event.target.closest("button");
    const card = event.target.closest(".card");
    if (pressed?.id === "download") download();
    else if (pressed?.dataset.all) decide(pressed.closest(".group").querySelectorAll(".choice"), pressed.dataset.all);
    else if (pressed?.closest(".choice")) decide([pressed.parentElement], pressed.ariaPressed === "true" ? "" : pressed.dataset.choice);
    else if (card && (pressed || event.target.closest(".pictures"))) show(cards.indexOf(card));
    else if (event.target === dialog || pressed?.id === "close") dialog.close();
    else if (pressed?.dataset.step) step(Number(pressed.dataset.step));
    else if (pressed?.dataset.choice !== undefined) decideCurrent(pressed.dataset.choice);
  });
  dialog.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const act = {
      arrowleft: () => step(-1), arrowright: () => step(1),
      k: () => decideCurrent("keep"), r: () => decideCurrent("reject"), u: () => decideCurrent(""),
    }[event.key.toLowerCase()];
    if (act) { event.preventDefault(); act(); }
  });
  dialog.addEventListener("close", () => {
    const button = cards[current].querySelector(".enlarge"); // a tile shows none
    (button.offsetParent ? button : cards[current]).focus();
  });
  window.addEventListener("pageshow", update);
  update();
})();
