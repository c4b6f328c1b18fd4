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

  /** Ask, and show the answer. settings: {model, system, …sampling}. */
  async ask(text, { system, ...settings }) {
    const said = this.#said;
    const turns = [...said, { role: "user", content: text }];
    const question = this.#article("user", "You");
    question.body.textContent = text;
    const answer = this.#article("assistant", settings.model);
    answer.article.classList.add("busy");
    this.#abort = new AbortController();
    this.changed();
    const progress = { text: "", thought: "", started: performance.now(), first: 0, last: 0, events: 0 };
    const draw = throttled(() => this.#draw(answer, progress));
    let failure = null;
    let stopped = false;
    try {
      const messages = system ? [{ role: "system", content: system }, ...turns] : turns;
      for await (const event of chat({ ...settings, messages }, this.#abort.signal)) {
        const [choice] = event.choices;
        if (event.usage) progress.usage = event.usage;
        if (choice?.finish_reason) progress.reason = choice.finish_reason;
        const { content, reasoning } = choice?.delta ?? {};
        if (!content && !reasoning) continue;
        progress.last = performance.now();
        progress.first ||= progress.last;
        progress.events += 1;
        progress.text += content ?? "";
        progress.thought += reasoning ?? "";
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
      said.push(turns.at(-1), { role: "assistant", content: progress.text });
    }
    this.changed(failure);
  }

  #article(role, name) {
    const article = document.createElement("article");
    article.className = role;
    const heading = Object.assign(document.createElement("h2"), { textContent: name });
    const body = Object.assign(document.createElement("div"), { className: "body" });
    if (role === "assistant") body.classList.add("markdown");
    article.append(heading, body);
    this.list.append(article);
    this.list.scrollTop = this.list.scrollHeight;
    return { article, body };
  }

  #draw({ body }, { text, thought }) {
    const { list } = this;
    const following = list.scrollHeight - list.scrollTop - list.clientHeight < 60;
    // Reasoning stays folded, or as the reader has left it.
    const folded = thought ? [body.querySelector("details.thought") ?? foldedThought()] : [];
    for (const { lastElementChild } of folded) lastElementChild.textContent = thought;
    body.replaceChildren(...folded, markdown(text));
    if (following) list.scrollTop = list.scrollHeight;
  }

  #finish({ article }, progress, stopped, failure) {
    const parts = [];
    const { first, last, started, events, usage, reason } = progress;
    const tokens = usage?.completion_tokens ?? events;
    if (first) {
      parts.push(`${((first - started) / 1000).toFixed(2)} s to first token`);
      if (tokens > 1 && last > first) {
        parts.push(`${((1000 * (tokens - 1)) / (last - first)).toFixed(1)} tokens/s`);
      }
      parts.push(`${tokens} ${tokens === 1 ? "token" : "tokens"}`);
      const drafts = usage?.draft_tokens_details;
      if (drafts) {
        parts.push(`${drafts.accepted_draft_tokens} of ${drafts.draft_tokens} drafts accepted`);
      }
    }
    if (stopped) parts.push("stopped");
    else if (reason === "length") parts.push("cut at max tokens");
    const stats = Object.assign(document.createElement("p"), { className: "stats" });
    stats.textContent = parts.join(" · ");
    article.append(stats);
    if (failure) {
      const problem = Object.assign(document.createElement("p"), { className: "problem" });
      problem.textContent = failure.message;
      article.append(problem);
    }
    this.list.scrollTop = this.list.scrollHeight;
    if (failure) this.announce(`Error: ${failure.message}`);
    else this.announce(stopped ? "Stopped." : `Answer: ${progress.text}`);
  }
}

function foldedThought() {
  const details = Object.assign(document.createElement("details"), { className: "thought" });
  const summary = Object.assign(document.createElement("summary"), { textContent: "Reasoning" });
  details.append(summary, document.createElement("p"));
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
