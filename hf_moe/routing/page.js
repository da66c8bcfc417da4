"use strict";
const COLOURS = 8, LINES = 4;
const choices = JSON.parse(document.getElementById("choices").textContent);
const slider = document.getElementById("layer");
const layers = slider.dataset.layers.split(",");
const told = document.getElementById("told");
const tokens = [...document.querySelectorAll(".passage .tok")];
let shown = null;

const chosen = (token) => choices[token.dataset.p][slider.value][token.dataset.t];

function paint() {
  const name = layers[slider.value];
  document.getElementById("layer-name").textContent = name;
  slider.setAttribute("aria-valuetext", "layer " + name);
  for (const token of tokens) {
    const first = chosen(token)[0];
    token.className = first ? `tok c${first[0] % COLOURS} u${Math.floor(first[0] / COLOURS) % LINES}` : "tok";
    token.dataset.e = first ? first[0] : "none";
  }
  if (shown) tell(shown);
}

function tell(token) {
  shown = token;
  const experts = chosen(token).map(([expert, percent]) => `expert ${expert} (gate ${percent} %)`);
  told.textContent = `“${token.textContent}” in layer ${layers[slider.value]}: ${experts.join(", ") || "no expert"}`;
}

function move(event) {
  const by = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity }[event.key];
  const token = event.target.closest(".tok");
  if (!by || !token) return;
  const row = [...token.closest(".passage").querySelectorAll(".tok")];
  const next = row[Math.max(0, Math.min(row.length - 1, row.indexOf(token) + by))];
  event.preventDefault();
  token.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}

slider.addEventListener("input", paint);
for (const passage of document.querySelectorAll(".passage")) {
  passage.addEventListener("keydown", move);
  for (const kind of ["focusin", "mouseover"])
    passage.addEventListener(kind, (event) => {
      const token = event.target.closest(".tok");
      if (token) tell(token);
    });
}
document.getElementById("numbers").addEventListener("change", (event) =>
  document.body.classList.toggle("numbers", event.target.checked));

const theme = document.getElementById("theme");
function setTheme(dark) {
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  theme.setAttribute("aria-pressed", String(dark));
}
setTheme(matchMedia("(prefers-color-scheme: dark)").matches);
theme.addEventListener("click", () => setTheme(theme.getAttribute("aria-pressed") !== "true"));
