// What the charts show, from the server's Prometheus metrics.

const WINDOW_SECONDS = 30; // a percentile is that of the observations in this time

/** Parses Prometheus' text format: {name: [{labels, value}]}. */
export function parse(text) {
  const samples = {};
  for (const line of text.split("\n")) {
    const match = line.match(/^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? ([^ ]+)$/);
    if (!match) continue;
    const labels = {};
    for (const [, name, value] of (match[2] ?? "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)) {
      labels[name] = value;
    }
    const value = match[3] === "+Inf" ? Infinity : Number(match[3]);
    (samples[match[1]] ??= []).push({ labels, value });
  }
  return samples;
}

function value(samples, name, labels = {}) {
  const matches = ({ labels: has }) => Object.entries(labels).every(([k, v]) => has[k] === v);
  return samples[name]?.find(matches)?.value ?? NaN;
}

function buckets(samples, name) {
  return (samples[`${name}_bucket`] ?? []).map(({ labels, value: count }) => ({
    le: labels.le === "+Inf" ? Infinity : Number(labels.le),
    count,
  }));
}

/** A quantile as in Prometheus' histogram_quantile: linear in a bucket; NaN if there are no data. */
export function quantile(q, now, before) {
  const counts = now.map(({ le, count }, index) => ({ le, count: count - (before[index]?.count ?? 0) }));
  const total = counts.at(-1)?.count ?? 0;
  if (!(total > 0)) return NaN;
  const rank = q * total;
  const index = counts.findIndex(({ count }) => count >= rank);
  const { le, count } = counts[index];
  const from = index ? counts[index - 1] : { le: 0, count: 0 };
  if (le === Infinity) return from.le;
  return from.le + ((le - from.le) * (rank - from.count)) / (count - from.count);
}

/** Computes the charts' values from consecutive readings of the metrics. */
export class Readings {
  #history = [];

  /** seconds: when the text was read. Returns {throughput: [a, b], …}; NaN if a value is unknown. */
  add(seconds, text) {
    const samples = parse(text);
    const last = this.#history.at(-1);
    this.#history.push({ seconds, samples });
    while (this.#history.length > 2 && this.#history[1].seconds <= seconds - WINDOW_SECONDS) {
      this.#history.shift();
    }
    const first = this.#history[0];
    const rate = (name) => {
      if (!last) return NaN;
      const change = value(samples, name) - value(last.samples, name);
      return change < 0 ? NaN : change / (seconds - last.seconds); // negative: a restart
    };
    const milliseconds = (name, q) =>
      1e3 * quantile(q, buckets(samples, name), buckets(first.samples, name));
    const ttft = "nybble_time_to_first_token_seconds";
    const itl = "nybble_inter_token_latency_seconds";
    return {
      healthy: value(samples, "nybble_engine_healthy") === 1,
      throughput: [rate("nybble_generation_tokens_total"), rate("nybble_prompt_tokens_total")],
      ttft: [milliseconds(ttft, 0.5), milliseconds(ttft, 0.95)],
      itl: [milliseconds(itl, 0.5), milliseconds(itl, 0.95)],
      sequences: [
        value(samples, "nybble_sequences_running"),
        value(samples, "nybble_sequences_waiting"),
      ],
      kv: [100 * value(samples, "nybble_kv_cache_usage_ratio")],
      adapters: ["device", "host", "disk"].map((place) =>
        value(samples, "nybble_adapters", { in: place }),
      ),
    };
  }
}
