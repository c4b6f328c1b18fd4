// The server's API, as any other client uses it. Paths are relative: a proxy may add a prefix.

// Token counts come with every event, for a rate while the answer is made.
const STREAM_OPTIONS = { include_usage: true, continuous_usage_stats: true };

let key = sessionStorage.getItem("api-key") ?? "";

export const apiKey = () => key;

export function setApiKey(value) {
  key = value;
  if (key) sessionStorage.setItem("api-key", key);
  else sessionStorage.removeItem("api-key");
}

export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

async function ask(path, options = {}) {
  const headers = { ...options.headers };
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached.", 0);
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new ApiError(body?.error?.message ?? response.statusText, response.status);
}

/** The models and adapters served: [{id, parent}], parent null for a base model. */
export async function models() {
  const { data } = await (await ask("v1/models")).json();
  return data;
}

export const metricsText = async () => (await ask("metrics")).text();
export const version = async () => (await (await ask("version")).json()).version;

/** The events of a streamed chat completion. Throws ApiError, for errors within the stream too. */
export async function* chat(body, signal) {
  const response = await ask("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: STREAM_OPTIONS }),
    signal,
  });
  for await (const data of serverSentEvents(response.body)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new ApiError(event.error.message, response.status);
    yield event;
  }
  throw new ApiError("The answer was cut off.", response.status);
}

async function* serverSentEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (buffer + value).split(/\r?\n\r?\n/);
    buffer = events.pop();
    for (const event of events) {
      const lines = event.split(/\r?\n/).filter((line) => line.startsWith("data:"));
      if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
    }
  }
}
