// Live update: the server renders every answer, this script only asks for it and puts it in place.
// Without this script the form works as a plain GET form.

import { draw } from "/static/chart.js";

const DEBOUNCE_MS = 150;

const form = document.getElementById("form");
const answer = document.getElementById("main");
const method = form.elements.namedItem("method");

let timer = 0;
let asking = new AbortController();

function fields() {
  return [...form.elements].filter((element) => element.name);
}

/** The form as a query; what equals its default is left out, so that links stay short. */
function query() {
  const pairs = fields()
    .filter((field) => !field.closest("[hidden]"))
    .filter((field) => field.value.trim() !== "" && field.value !== field.dataset.default)
    .map((field) => [field.name, field.value]);
  return new URLSearchParams([...pairs, ...measured()]).toString();
}

/** What was measured is no field of the run: it stays in the address while the run changes. */
function measured() {
  const given = new URLSearchParams(location.search);
  return ["measured", "meter", "oom"]
    .filter((name) => given.get(name))
    .map((name) => [name, given.get(name)]);
}

/** Writes an address's query into the form. */
function restore(search) {
  const given = new URLSearchParams(search);
  for (const field of fields()) {
    const value = given.get(field.name) ?? field.dataset.default;
    if (field instanceof HTMLSelectElement && ![...field.options].some((o) => o.value === value)) {
      field.add(new Option(value, value));
    }
    field.value = value;
  }
  showFieldsOfMethod();
}

function showFieldsOfMethod() {
  for (const control of form.querySelectorAll("[data-methods]")) {
    control.hidden = !control.dataset.methods.split(" ").includes(method.value);
  }
}

function address() {
  const search = query();
  return search ? `/?${search}` : "/";
}

async function refresh() {
  clearTimeout(timer);
  asking.abort();
  asking = new AbortController();
  const { signal } = asking;
  answer.setAttribute("aria-busy", "true");
  try {
    const response = await fetch(`/answer?${query()}`, { signal });
    const page = new DOMParser().parseFromString(await response.text(), "text/html");
    if (!response.ok || !page.getElementById("verdict")) {
      throw new Error(`the server answered ${response.status}`);
    }
    replace(page);
  } catch (error) {
    if (error.name === "AbortError") return;
    say("The server does not answer; the result below is that of an earlier form.");
  }
  answer.removeAttribute("aria-busy");
}

/** Puts the new answer in place; the live region itself stays, so that it is read aloud. */
function replace(page) {
  const verdict = document.getElementById("verdict");
  const next = page.getElementById("verdict");
  if (verdict.className !== next.className) verdict.className = next.className;
  if (verdict.innerHTML !== next.innerHTML) verdict.replaceChildren(...next.childNodes);
  const open = [...document.querySelectorAll("#details details")].map((part) => part.open);
  document.getElementById("details").replaceChildren(...page.getElementById("details").childNodes);
  document.querySelectorAll("#details details").forEach((part, index) => {
    part.open = open[index] ?? false;
  });
  draw(document.getElementById("peak"), form.dataset.plotly);
}

function say(text) {
  const message = document.createElement("p");
  message.textContent = text;
  document.getElementById("verdict").replaceChildren(message);
}

form.addEventListener("input", () => {
  showFieldsOfMethod();
  clearTimeout(timer);
  timer = setTimeout(() => {
    history.replaceState(null, "", address());
    refresh();
  }, DEBOUNCE_MS);
});

form.addEventListener("submit", (event) => {
  event.preventDefault();
  history.pushState(null, "", address());
  refresh();
});

answer.addEventListener("click", (event) => {
  const link = event.target.closest("a.apply");
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  history.pushState(null, "", link.href);
  restore(link.search);
  refresh();
});

window.addEventListener("popstate", () => {
  restore(location.search);
  refresh();
});

window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  draw(document.getElementById("peak"), form.dataset.plotly);
});

showFieldsOfMethod();
draw(document.getElementById("peak"), form.dataset.plotly);
