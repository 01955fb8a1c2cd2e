"use strict";
(() => {
  const holders = [...document.querySelectorAll("[data-path]")]; // a fieldset on a card, a select in a list
  const count = document.getElementById("decided");
  const button = document.getElementById("download");
  const dialog = document.getElementById("compare");
  const cards = [...document.querySelectorAll(".card")].filter((card) => card.querySelector(".enlarge"));
  let saved = true;
  let current = 0;

  const choice = (holder) => (holder.matches("select") ? holder.value : holder.querySelector("input:checked").value);
  const decisions = () =>
    holders.map((h) => [h.dataset.sha, h.dataset.path, choice(h)]).filter((row) => row[2] !== "");
  const field = (text) => (/[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);

  function update() {
    const decided = decisions().length;
    count.textContent = decided === 1 ? "1 image decided" : `${decided} images decided`;
    button.disabled = decided === 0;
  }

  function download() {
    const lines = [["sha256", "image_path", "decision"], ...decisions()].map((row) => row.map(field).join(","));
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([lines.join("\n") + "\n"], { type: "text/csv" }));
    link.download = "decisions.csv";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    saved = true;
  }

  function show(index) {
    current = (index + cards.length) % cards.length;
    const card = cards[current];
    dialog.querySelector("h2").textContent = card.querySelector("h4").textContent;
    dialog.querySelector("#place").textContent = `${current + 1} of ${cards.length}`;
    dialog.querySelector(".why").textContent = card.querySelector(".why").textContent;
    dialog.querySelector(".facts").replaceWith(card.querySelector(".facts").cloneNode(true));
    const pictures = card.querySelector(".pictures").cloneNode(true);
    pictures.classList.toggle("wide", card.classList.contains("wide"));
    dialog.querySelector(".pictures").replaceWith(pictures);
    const now = choice(card.querySelector("[data-path]"));
    for (const b of dialog.querySelectorAll("[data-choice]")) b.setAttribute("aria-pressed", b.dataset.choice === now);
    if (!dialog.open) {
      dialog.showModal();
      dialog.querySelector("h2").focus(); // the first button stands below the pictures: focus there scrolls past them
    }
    dialog.scrollTop = 0;
  }

  function decide(value) {
    const input = cards[current].querySelector(`input[value="${value}"]`);
    input.checked = true;
    input.dispatchEvent(new Event("change", { bubbles: true }));
    show(current + 1);
  }

  document.addEventListener("change", () => { saved = false; update(); });
  window.addEventListener("pageshow", update); // browsers restore choices when they come back to a page
  window.addEventListener("beforeunload", (event) => { if (!saved && decisions().length) event.preventDefault(); });
  button.addEventListener("click", download);
  cards.forEach((card, index) => {
    card.querySelector(".enlarge").addEventListener("click", () => show(index));
    card.querySelector(".pictures").addEventListener("click", () => show(index));
  });
  dialog.addEventListener("click", (event) => {
    const pressed = event.target.closest("button");
    if (event.target === dialog || pressed?.id === "close") dialog.close();
    else if (pressed?.dataset.step) show(current + Number(pressed.dataset.step));
    else if (pressed?.dataset.choice !== undefined) decide(pressed.dataset.choice);
  });
  dialog.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const act = {
      ArrowLeft: () => show(current - 1), ArrowRight: () => show(current + 1),
      k: () => decide("keep"), r: () => decide("reject"), u: () => decide(""),
    }[event.key];
    if (act) { event.preventDefault(); act(); }
  });
  dialog.addEventListener("close", () => cards[current].querySelector(".enlarge").focus());
  update();
})();
