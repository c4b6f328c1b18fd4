// The page: settings and composer around a conversation, charts beside it.

import { apiKey, metricsText, models, setApiKey, version } from "./api.js";
import { CHARTS, Chart } from "./charts.js";
import { Conversation } from "./chat.js";
import { Readings } from "./metrics.js";
import { themeToggle } from "./theme.js";

const POLL_MILLISECONDS = 2000;
const MODELS_MILLISECONDS = 15000;
const SAMPLING = ["temperature", "top_p", "top_k", "max_tokens", "seed"];

const $ = (id) => document.getElementById(id);
const announce = (text) => ($("announce").textContent = text);

themeToggle($("theme"));

const conversation = new Conversation($("messages"), {
  announce,
  changed(failure) {
    $("send").hidden = conversation.busy;
    $("stop").hidden = !conversation.busy;
    $("empty").hidden = $("messages").querySelector("article") !== null;
    if (failure?.status === 401) $("key").focus();
    else if (!conversation.busy) $("prompt").focus();
  },
});

function settings() {
  const chosen = { model: $("model").value, system: $("system").value.trim() };
  for (const name of SAMPLING) {
    if ($(name).value !== "") chosen[name] = Number($(name).value);
  }
  return chosen;
}

async function send() {
  const text = $("prompt").value.trim();
  if (!text || conversation.busy || !$("settings").reportValidity()) return;
  if (!$("model").value) await showModels();
  $("prompt").value = "";
  grow();
  await conversation.ask(text, settings());
}

function grow() {
  const prompt = $("prompt");
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight + 2}px`;
}

let listed = "";

/** Update the list of models, except while it is in use: adapters are loaded and unloaded. */
async function showModels() {
  const select = $("model");
  try {
    const served = await models();
    const list = JSON.stringify(served.map(({ id, parent }) => [id, parent]));
    if (list === listed || document.activeElement === select) return;
    listed = list;
    const chosen = select.value;
    const group = (label, members) => {
      const node = Object.assign(document.createElement("optgroup"), { label });
      for (const { id } of members) node.append(new Option(id, id));
      return node;
    };
    const bases = served.filter(({ parent }) => !parent);
    const adapters = served.filter(({ parent }) => parent);
    select.replaceChildren(group("Base model", bases));
    if (adapters.length) select.append(group("Adapters", adapters));
    if (served.some(({ id }) => id === chosen)) select.value = chosen;
  } catch (error) {
    listed = "";
    select.replaceChildren(new Option(error.status === 401 ? "needs an API key" : "unknown", ""));
  }
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("settings").addEventListener("submit", (event) => event.preventDefault());
$("prompt").addEventListener("input", grow);
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && conversation.busy) conversation.stop();
});
$("stop").addEventListener("click", () => conversation.stop());
$("clear").addEventListener("click", () => {
  conversation.clear();
  $("empty").hidden = false;
  $("prompt").focus();
  announce("New chat.");
});
$("key").value = apiKey();
$("key").addEventListener("change", ({ target }) => {
  setApiKey(target.value.trim());
  showModels();
});

const readings = new Readings();
const charts = CHARTS.map((chart) => new Chart(chart, $("charts")));

function health(state, text) {
  const node = $("health");
  node.dataset.state = state;
  if (node.textContent !== text) node.textContent = text;
}

let named = "";
async function poll() {
  if (document.hidden) return;
  try {
    const text = await metricsText();
    const seconds = performance.now() / 1000;
    const reading = readings.add(seconds, text);
    for (const chart of charts) chart.add(seconds, reading[chart.key]);
    named ||= await version();
    health(reading.healthy ? "ok" : "bad", reading.healthy ? `ready · ${named}` : "engine is down");
  } catch (error) {
    health("bad", error.message);
  }
}

showModels();
poll();
setInterval(poll, POLL_MILLISECONDS);
setInterval(() => document.hidden || showModels(), MODELS_MILLISECONDS);
