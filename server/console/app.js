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

function changed(failure) {
  $("send").hidden = busy();
  $("stop").hidden = !busy();
  $("empty").hidden = $("messages").querySelector("article") !== null;
  if (failure?.status === 401) $("key").focus();
  else if (!busy()) $("prompt").focus();
}

const conversation = new Conversation($("messages"), { announce, changed });
const other = new Conversation($("others"), { announce, changed });
const busy = () => conversation.busy || other.busy;

function stop() {
  conversation.stop();
  other.stop();
}

/** The weights of adapters in "first=0.7, second=0.3"; throws an error that says what is wrong. */
function mixtureIn(text) {
  const weights = {};
  for (const part of text.split(",")) {
    const [, name, weight] = part.match(/^\s*(.*?)\s*=\s*(\S+)\s*$/) ?? [];
    if (!name || !Number.isFinite(Number(weight))) throw new Error("Expected name=weight, …");
    if (name in weights) throw new Error(`${name} is there twice.`);
    weights[name] = Number(weight);
  }
  return weights;
}

function settings() {
  const chosen = { model: $("model").value, system: $("system").value.trim() };
  for (const name of SAMPLING) {
    if ($(name).value !== "") chosen[name] = Number($(name).value);
  }
  const tools = $("tools").value.trim();
  if (tools) chosen.tools = JSON.parse(tools);
  const mixture = $("mixture").value.trim();
  if (mixture) {
    // Of the base model, which is the first of the list.
    Object.assign(chosen, { model: $("model").options[0].value, title: mixture, adapter: mixtureIn(mixture) });
  }
  return chosen;
}

async function send() {
  const text = $("prompt").value.trim();
  if (!text || busy() || !$("settings").reportValidity()) return;
  if (!$("model").value) await showModels();
  $("prompt").value = "";
  grow();
  const chosen = settings();
  const asked = [conversation.ask(text, chosen)];
  const compared = $("other").value;
  if (compared) {
    asked.push(other.ask(text, { ...chosen, model: compared, title: compared, adapter: undefined }));
  }
  await Promise.all(asked);
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
    if (list === listed || [select, $("other")].includes(document.activeElement)) return;
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
    const compared = $("other").value;
    $("other").replaceChildren(new Option("nothing", ""), ...served.map(({ id }) => new Option(id, id)));
    if (served.some(({ id }) => id === compared)) $("other").value = compared;
    else showOther();
  } catch (error) {
    listed = "";
    select.replaceChildren(new Option(error.status === 401 ? "needs an API key" : "unknown", ""));
  }
}

/** Show the other model's conversation, if one is chosen; it knows what was said before. */
function showOther() {
  const hidden = !$("other").value;
  if (hidden) other.clear();
  else if ($("others").hidden) other.adopt(conversation);
  $("others").hidden = hidden;
}

$("other").addEventListener("change", showOther);

/** Say in the field what is wrong with its text. check: throws if something is. */
function validated(field, check) {
  field.addEventListener("input", () => {
    let problem = "";
    try {
      if (field.value.trim()) check(field.value);
    } catch (error) {
      problem = error.message;
    }
    field.setCustomValidity(problem);
  });
}

validated($("mixture"), mixtureIn);
validated($("tools"), (text) => {
  if (!Array.isArray(JSON.parse(text))) throw new Error("Expected a JSON list.");
});
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
  if (event.key === "Escape" && busy()) stop();
});
$("stop").addEventListener("click", stop);
$("clear").addEventListener("click", () => {
  conversation.clear();
  other.clear();
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
