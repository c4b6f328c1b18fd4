// A conversation: its messages, shown as they arrive.

import { ApiError, chat } from "./api.js";
import { markdown } from "./markdown.js";

const DRAW_MILLISECONDS = 60;

export class Conversation {
  #said = []; // {role, content} as the API takes them
  #abort = null;

  /** list: the element that shows the messages. changed: called when an answer begins and ends. */
  constructor(list, { changed, announce }) {
    this.list = list;
    this.changed = changed;
    this.announce = announce;
    list.addEventListener("click", ({ target }) => {
      if (target.dataset.copy === undefined) return;
      navigator.clipboard?.writeText(target.dataset.copy).then(() => {
        target.textContent = "Copied";
        setTimeout(() => (target.textContent = "Copy"), 1500);
      });
    });
  }

  get busy() {
    return this.#abort !== null;
  }

  stop() {
    this.#abort?.abort();
  }

  clear() {
    this.stop();
    this.#said = [];
    for (const article of this.list.querySelectorAll("article")) article.remove();
  }

  /** Begin with what was said to another model. */
  adopt(other) {
    this.clear();
    this.#said = [...other.#said];
  }

  /** The turns that a text from the user makes: the results of the calls that wait for them. */
  #turnsOf(text) {
    const calls = this.#said.at(-1)?.tool_calls ?? [];
    if (!calls.length) return [{ role: "user", content: text }];
    return calls.map(({ id }) => ({ role: "tool", tool_call_id: id, content: text }));
  }

  /** Ask, and show the answer. settings: {model, title, system, tools, …sampling}, where the
   * title is shown instead of the model. */
  async ask(text, { system, title, ...settings }) {
    const said = this.#said;
    const asked = this.#turnsOf(text);
    const turns = [...said, ...asked];
    const question = this.#article("user", asked[0].role === "tool" ? "Result of the call" : "You");
    question.body.textContent = text;
    const answer = this.#article("assistant", title ?? settings.model);
    answer.article.classList.add("busy");
    this.#abort = new AbortController();
    this.changed();
    const started = performance.now();
    const progress = { text: "", thought: "", calls: [], started, first: 0, last: 0, events: 0 };
    progress.origins = new Origins();
    const draw = throttled(() => this.#draw(answer, progress));
    let failure = null;
    let stopped = false;
    try {
      const messages = system ? [{ role: "system", content: system }, ...turns] : turns;
      for await (const event of chat({ ...settings, messages }, this.#abort.signal)) {
        const [choice] = event.choices;
        if (event.usage) {
          progress.usage = event.usage;
          progress.origins.count(event.usage);
        }
        if (choice?.finish_reason) progress.reason = choice.finish_reason;
        const { content, reasoning, tool_calls: calls } = choice?.delta ?? {};
        if (!content && !reasoning && !calls) continue;
        progress.last = performance.now();
        progress.first ||= progress.last;
        progress.events += 1;
        progress.text += content ?? "";
        progress.thought += reasoning ?? "";
        for (const part of calls ?? []) addCall(progress.calls, part);
        progress.origins.add(
          (reasoning ?? "") + (content ?? "") + (calls ?? []).map(writtenCall).join(""),
        );
        draw();
      }
    } catch (error) {
      stopped = error.name === "AbortError";
      if (!stopped) failure = error instanceof ApiError ? error : new ApiError(String(error), 0);
    }
    draw.now();
    answer.article.classList.remove("busy");
    this.#abort = null;
    this.#finish(answer, progress, stopped, failure);
    if (said === this.#said && (progress.text || !failure)) {
      const turn = { role: "assistant", content: progress.text };
      // A call that was cut off is not to be answered.
      if (progress.calls.length && progress.reason === "tool_calls") turn.tool_calls = progress.calls;
      said.push(...asked, turn);
    }
    this.changed(failure);
  }

  #article(role, name) {
    const article = document.createElement("article");
    article.className = role;
    const heading = Object.assign(document.createElement("h2"), { textContent: name });
    const body = Object.assign(document.createElement("div"), { className: "body" });
    if (role === "assistant") body.classList.add("markdown");
    const stats = Object.assign(document.createElement("p"), { className: "stats" });
    article.append(heading, body);
    if (role === "assistant") article.append(stats);
    this.list.append(article);
    this.list.scrollTop = this.list.scrollHeight;
    return { article, body, stats };
  }

  #draw({ article, body, stats }, progress) {
    const { text, thought, calls } = progress;
    const { list } = this;
    const following = list.scrollHeight - list.scrollTop - list.clientHeight < 60;
    // Reasoning stays folded, or as the reader has left it.
    const folded = thought ? [body.querySelector("details.thought") ?? foldedThought()] : [];
    for (const { lastElementChild } of folded) lastElementChild.textContent = thought;
    body.replaceChildren(...folded, markdown(text), ...calls.map(shownCall));
    stats.textContent = [...rates(progress), ...acceptance(progress)].join(" · ");
    showDrafts(article, stats, progress.origins);
    if (following) list.scrollTop = list.scrollHeight;
  }

  #finish({ article, stats }, progress, stopped, failure) {
    const { first, started, reason } = progress;
    const parts = first ? [`${((first - started) / 1000).toFixed(2)} s to first token`] : [];
    parts.push(...rates(progress));
    parts.push(...acceptance(progress));
    if (stopped) parts.push("stopped");
    else if (reason === "length") parts.push("cut at max tokens");
    stats.textContent = parts.join(" · ");
    if (failure) {
      const problem = Object.assign(document.createElement("p"), { className: "problem" });
      problem.textContent = failure.message;
      article.append(problem);
    }
    this.list.scrollTop = this.list.scrollHeight;
    if (failure) this.announce(`Error: ${failure.message}`);
    else if (stopped) this.announce("Stopped.");
    else {
      const called = progress.calls.map((call) => `Calls ${call.function.name}.`);
      this.announce([`Answer: ${progress.text}`, ...called].join(" "));
    }
  }
}

/** What is known of an answer's speed, while it is made and afterwards. */
function rates({ first, last, events, usage }) {
  if (!first) return [];
  const tokens = usage?.completion_tokens ?? events;
  const parts = [`${tokens} ${tokens === 1 ? "token" : "tokens"}`];
  if (tokens > 1 && last > first) {
    parts.unshift(`${((1000 * (tokens - 1)) / (last - first)).toFixed(1)} tokens/s`);
  }
  return parts;
}

/** What became of an answer's draft tokens, if there are any. */
function acceptance({ usage }) {
  const drafts = usage?.draft_tokens_details;
  return drafts ? [`${drafts.accepted_draft_tokens} of ${drafts.draft_tokens} drafts accepted`] : [];
}

/** Which parts of an answer's text were accepted drafts.
 *
 * A step's accepted tokens come first of its tokens, and every event counts both so far: as many
 * tokens as the count of accepted ones grows by are a run. */
class Origins {
  runs = []; // {text, drafted, tokens}, where only drafted tokens are counted
  #tokens = 0;
  #accepted = 0;
  #left = 0; // of the step's accepted tokens, those whose events are still to come
  #drafted = false; // whether the newest tokens are accepted ones
  #uncounted = 0; // how many of them no run has yet

  /** Take an event's counts. Several events of one token have the same. */
  count({ completion_tokens: tokens, draft_tokens_details: drafts }) {
    const accepted = drafts?.accepted_draft_tokens ?? 0;
    const came = tokens - this.#tokens;
    this.#left += accepted - this.#accepted;
    [this.#tokens, this.#accepted] = [tokens, accepted];
    if (came <= 0) return;
    // Text that was held back comes with a later token's: it is a draft's if all its tokens are.
    this.#drafted = came <= this.#left;
    this.#uncounted = this.#drafted ? came : 0;
    this.#left = Math.max(this.#left - came, 0);
  }

  add(text) {
    if (this.runs.at(-1)?.drafted !== this.#drafted) {
      this.runs.push({ text: "", drafted: this.#drafted, tokens: 0 });
    }
    const run = this.runs.at(-1);
    run.text += text;
    run.tokens += this.#uncounted;
    this.#uncounted = 0;
  }
}

/** Show the runs beside the answer, folded: marks in rendered Markdown would cut through it. */
function showDrafts(article, before, { runs }) {
  const accepted = runs.filter((run) => run.drafted);
  if (!accepted.length) return;
  let details = article.querySelector("details.drafts");
  if (!details) {
    details = foldedText("drafts", "pre");
    before.before(details);
  }
  const [summary, text] = details.children;
  summary.textContent = `Accepted drafts: ${accepted.length} ${accepted.length === 1 ? "run" : "runs"}`;
  text.replaceChildren(...runs.map(shownRun));
}

function shownRun({ text, drafted, tokens }) {
  if (!drafted) return text;
  const mark = Object.assign(document.createElement("mark"), { textContent: text });
  mark.title = `${tokens} accepted draft ${tokens === 1 ? "token" : "tokens"}`;
  return mark;
}

/** Add a piece of a streamed call to the calls so far. */
function addCall(calls, { index, id, function: piece }) {
  calls[index] ??= { id, type: "function", function: { name: "", arguments: "" } };
  calls[index].function.name += piece?.name ?? "";
  calls[index].function.arguments += piece?.arguments ?? "";
}

/** A piece of a streamed call as text. */
function writtenCall({ function: piece }) {
  return (piece?.name ?? "") + (piece?.arguments ?? "");
}

function shownCall({ function: { name, arguments: text } }) {
  const figure = Object.assign(document.createElement("figure"), { className: "code call" });
  const caption = Object.assign(document.createElement("figcaption"), { textContent: `Calls ${name}` });
  const code = Object.assign(document.createElement("code"), { textContent: text });
  const pre = document.createElement("pre");
  pre.append(code);
  figure.append(caption, pre);
  return figure;
}

function foldedThought() {
  const details = foldedText("thought", "p");
  details.firstElementChild.textContent = "Reasoning";
  return details;
}

/** A summary, and an element of this kind for the text that is folded under it. */
function foldedText(className, kind) {
  const details = Object.assign(document.createElement("details"), { className });
  details.append(document.createElement("summary"), document.createElement(kind));
  return details;
}

/** Calls a function at most once every DRAW_MILLISECONDS; .now() calls it at once. */
function throttled(draw) {
  let timer = null;
  const later = () => {
    timer ??= setTimeout(later.now, DRAW_MILLISECONDS);
  };
  later.now = () => {
    clearTimeout(timer);
    timer = null;
    draw();
  };
  return later;
}
