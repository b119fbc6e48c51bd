"use strict";
const EVERY_MS = 1000, PATIENCE_MS = 4000, ROWS = 20, HISTORY = 60, MAX_PAIRS = 40;
const TIERS = {
  edge_mcu: ["◆", "microcontroller"], edge_gpu: ["■", "gateway"], cloud_gpu: ["▲", "cloud GPU"],
  cloud_serverless: ["△", "serverless"], cache: ["●", "cache, fresh"], fallback: ["◍", "cache, stale"], none: ["✕", "no answer"],
};
const STAGES = [
  ["Microcontroller", ["edge_mcu"]], ["Gateway", ["edge_gpu"]], ["Cloud", ["cloud_gpu", "cloud_serverless"]], ["Cache", ["cache", "fallback"]],
];
const at = id => document.getElementById(id);
const num = value => typeof value === "number" && isFinite(value) ? value : 0;
const obj = value => value !== null && typeof value === "object" && !Array.isArray(value) ? value : {};
const arr = value => Array.isArray(value) ? value : [];

/* Everything shown goes through text nodes: what a sensor or a peer sent is never markup. */
function el(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes || {})) if (value !== null && value !== undefined) node.setAttribute(key, value);
  node.append(...children.filter(child => child !== null && child !== undefined && child !== ""));
  return node;
}
const fill = (node, children) => node.replaceChildren(...children);
function say(node, text) { if (node.textContent !== text) node.textContent = text; }

const whole = value => Math.round(num(value)).toLocaleString("en");
function brief(value) {
  value = num(value);
  return value < 1e6 ? whole(value) : Intl.NumberFormat("en", {notation: "compact", maximumSignificantDigits: 3}).format(value);
}
function percent(part, total) {
  if (!total) return "–";
  const share = 100 * part / total;
  return (share > 0 && share < 10 || share > 99 && share < 100 ? share.toFixed(1) : Math.round(share)) + " %";
}
function ms(value, beside = value) {
  if (typeof value !== "number" || !isFinite(value)) return "–";
  if (beside >= 1000) return (value / 1000).toFixed(2) + " s";
  return value.toFixed(value >= 100 ? 0 : value >= 10 ? 1 : 2) + " ms";
}
function size(bytes) { return bytes < 1e3 ? bytes + " B" : bytes < 1e6 ? (bytes / 1e3).toFixed(1) + " kB" : (bytes / 1e6).toFixed(1) + " MB"; }
function span(seconds) {
  seconds = Math.max(0, num(seconds));
  if (seconds < 60) return (seconds < 10 ? seconds.toFixed(1) : Math.floor(seconds)) + " s";
  const minutes = Math.floor(seconds / 60);
  if (minutes < 60) return minutes + " min";
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? hours + " h " + (minutes % 60) + " min" : Math.floor(hours / 24) + " d " + (hours % 24) + " h";
}
function usd(value) { value = num(value); return value === 0 ? "0 $" : (value < 0.01 ? value.toPrecision(2) : value.toFixed(2)) + " $"; }
const clock = date => date.toLocaleTimeString("en-GB");
const words = name => String(name).replaceAll("_", " ").replaceAll(".", " · ");
function plain(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (typeof value === "number") return Number.isInteger(value) ? whole(value) : String(+value.toPrecision(4));
  return String(value).slice(0, 120);
}
function tier(name, text) {
  const [shape, label] = TIERS[name] || ["?", words(name)];
  return el("span", {class: "tier t-" + (TIERS[name] ? name : "none")}, el("b", {"aria-hidden": "true"}, shape), text || label);
}
function pairs(value, prefix = "", into = []) {
  for (const [key, item] of Object.entries(obj(value))) {
    if (into.length >= MAX_PAIRS) break;
    if (Array.isArray(item) && item.every(one => typeof one !== "object")) into.push([prefix + key, item.join(", ") || "–"]);
    else if (Array.isArray(item)) item.forEach((one, i) => pairs(one, prefix + (obj(one).port || obj(one).name || key + " " + i) + ".", into));
    else if (item !== null && typeof item === "object") pairs(item, prefix + key + ".", into);
    else if (/(^|_)bytes$/.test(key) && typeof item === "number") into.push([prefix + key.replace(/_?bytes$/, "") || "size", size(item)]);
    else if (key === "port") into.push([prefix + key, String(item)]);
    else if (key === "since" && item > 1e9) into.push([prefix + key, new Date(item * 1000).toLocaleString("en-GB")]);
    else into.push([prefix + key, plain(item)]);
  }
  return into;
}
const named = list => list.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {class: "num"}, value)]);
const terms = list => named(list.map(([key, value]) => [words(key), value]));

/* --- the parts of the page --- */
const history = [];
let before = null;
function rate(requests, now) {
  if (before && requests >= before[0] && now > before[1]) {
    history.push((requests - before[0]) / ((now - before[1]) / 1000));
    if (history.length > HISTORY) history.shift();
  }
  before = [requests, now];
  return history.length ? history[history.length - 1] : 0;
}
function spark() {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg"), line = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
  const top = Math.max(...history, 1e-9);
  svg.setAttribute("viewBox", "0 0 59 20"); svg.setAttribute("preserveAspectRatio", "none"); svg.setAttribute("aria-hidden", "true");
  line.setAttribute("points", history.map((value, i) => (i + HISTORY - history.length) + "," + (18 - 16 * value / top).toFixed(1)).join(" "));
  svg.append(line);
  return svg;
}
function figure(name, value, ...more) { return el("div", {class: "figure"}, el("dt", {}, name), el("dd", {class: "num"}, value, ...more)); }
function figures(counters, now) {
  const answered = num(counters.answered), perSecond = rate(num(counters.requests), now);
  fill(at("figures"), [
    figure("Requests", brief(counters.requests), el("small", {}, perSecond.toFixed(1) + " per second"), history.length > 1 ? spark() : null),
    figure("By the deadline", percent(counters.deadline_hits, answered + num(counters.refused)), el("small", {}, whole(counters.deadline_hits) + " answers")),
    figure("From the cache", percent(num(counters.cached) + num(counters.stale), answered), el("small", {}, whole(counters.cached) + " used as fresh")),
    figure("Stale", percent(counters.stale, answered), el("small", {}, whole(counters.stale) + " answers")),
    figure("Refused", brief(counters.refused), el("small", {}, percent(counters.refused, counters.requests) + " of requests")),
    figure("Cloud bill", usd(counters.cost_usd), el("small", {}, usd(1000 * num(counters.cost_usd) / Math.max(1, num(counters.requests))) + " per 1,000")),
  ]);
}
function counts(counters) {
  const shares = {...obj(counters.by_tier)};
  if (num(counters.cached)) shares.cache = counters.cached;
  return shares;
}
function where(counters) {
  const shares = counts(counters), known = Object.keys(TIERS).filter(name => num(shares[name]) > 0);
  const total = known.reduce((sum, name) => sum + shares[name], 0);
  fill(at("shares"), known.map(name => { const bar = el("i", {class: "t-" + name}); bar.style.width = 100 * shares[name] / total + "%"; return bar; }));
  fill(at("legend"), known.length ? known.map(name => el("li", {}, tier(name), " ", el("span", {class: "quiet num"}, whole(shares[name]) + ", " + percent(shares[name], total)))) : [el("li", {class: "quiet"}, "No answers yet.")]);
  return [shares, total];
}
function stateOf(target) {
  const breaker = obj(target.breaker).state;
  if (target.available) return breaker === "half_open" || breaker === "half-open" ? ["half", "◐ on probation"] : ["up", "● up"];
  return ["off", breaker === "open" ? "✕ paused" : "✕ down"];
}
const open = new Set();
function more(key, list) {
  if (!list.length) return null;
  const node = el("details", {}, el("summary", {}, "Details"), el("dl", {}, ...terms(list)));
  node.open = open.has(key);
  node.addEventListener("toggle", () => node.open ? open.add(key) : open.delete(key));
  return node;
}
/* Texts found anywhere below `node` under one of these keys. */
function gather(node, keys, found = new Set(), depth = 0) {
  if (Array.isArray(node)) node.forEach(one => gather(one, keys, found, depth + 1));
  else if (depth < 6) for (const [key, value] of Object.entries(obj(node))) {
    const texts = Array.isArray(value) ? value : [value];
    if (keys.includes(key)) texts.filter(one => typeof one === "string").forEach(one => found.add(one));
    gather(value, keys, found, depth + 1);
  }
  return [...found].slice(0, 8).join(", ").slice(0, 240);
}
function card(target) {
  const [kind, text] = stateOf(target), detail = obj(target.detail), breaker = obj(target.breaker), times = obj(target.service_ms), list = [];
  const models = gather(detail, ["model", "models", "models_loaded", "variants"]), provider = gather(detail, ["provider", "providers", "engine"]);
  if (models) list.push(["models", models]);
  if (provider) list.push(["runs on", provider]);
  for (const board of arr(detail.ports).slice(0, 8).map(obj)) list.push([String(board.port).split("/").pop(), words(board.state)]);
  if (detail.workers) list.push(["workers", typeof detail.workers === "object" ? String(Object.keys(detail.workers).length) : plain(detail.workers)]);
  list.push(["p50 / p95", num(times.p95) ? ms(times.p50, times.p95).replace(/ m?s$/, "") + " / " + ms(times.p95) : "not measured"]);
  list.push(["in flight", plain(num(target.in_flight)) + " of " + plain(target.max_concurrent)]);
  list.push(["asked / failed", brief(target.requests) + " / " + brief(target.failures)]);
  if (breaker.state && breaker.state !== "closed") list.push(["breaker", words(breaker.state) + (num(breaker.retry_in_s) > 0 ? ", next try in " + span(breaker.retry_in_s) : "")]);
  if (num(target.cost_usd)) list.push(["price", usd(target.cost_usd)]);
  if (target.region) list.push(["region", String(target.region)]);
  const bar = el("i"); bar.style.width = Math.min(100, 100 * num(target.in_flight) / Math.max(1, num(target.max_concurrent))) + "%";
  return el("article", {class: "target t-" + (TIERS[target.tier] ? target.tier : "none") + (kind === "off" ? " down" : "")},
    el("div", {class: "head"}, el("span", {class: "name"}, tier(target.tier, String(target.name))), el("span", {class: "state " + kind}, text)),
    target.reason ? el("p", {class: "why"}, String(target.reason).slice(0, 200)) : null,
    el("dl", {}, ...terms(list)), el("div", {class: "meter", "aria-hidden": "true"}, bar), more(String(target.name), pairs(detail)));
}
function cacheCard(cache) {
  const list = pairs(cache);
  return el("article", {class: "target t-cache"},
    el("div", {class: "head"}, el("span", {class: "name"}, tier("cache", "earlier answers")), el("span", {class: "state up"}, "● up")),
    list.length ? el("dl", {}, ...terms(list.slice(0, 7))) : el("p", {class: "quiet"}, "No figures."), more("cache", list.slice(7)));
}
function path(status, shares, total) {
  const targets = arr(status.targets).map(obj).sort((a, b) => num(a.order) - num(b.order));
  const stages = STAGES.map(([title, tiers]) => [title, tiers, targets.filter(target => tiers.includes(target.tier))])
    .filter(([title, , members]) => title === "Cache" || members.length);
  const node = at("path"), focused = document.activeElement && document.activeElement.closest("article") ? [...node.querySelectorAll("summary")].indexOf(document.activeElement) : -1;
  node.style.setProperty("--stages", stages.length);
  fill(node, stages.map(([title, tiers, members]) => {
    const share = tiers.reduce((sum, name) => sum + num(shares[name]), 0);
    return el("li", {class: "stage"}, el("header", {}, el("h3", {}, title), el("span", {class: "share num", title: "of all answers"}, percent(share, total))),
      ...(title === "Cache" ? [cacheCard(status.cache)] : members.map(card)));
  }));
  if (focused >= 0) { const summary = node.querySelectorAll("summary")[focused]; if (summary) summary.focus({preventScroll: true}); }
}
function row(answer) {
  answer = obj(answer);
  const cell = (kind, ...children) => el("td", {role: "cell", class: kind}, ...children);
  const time = typeof answer.at === "number" ? clock(new Date(answer.at * 1000)) : "–";
  if (answer.error) {
    const attempts = arr(answer.attempts).map(one => obj(one).target + " " + obj(one).outcome).join(", ");
    return el("tr", {role: "row"}, cell("time num", time), cell("model", answer.model ? String(answer.model) : "–"),
      cell("label refused", words(obj(answer.error).code)), cell("from", tier("none")), cell("took right", "–"), cell("age", ""),
      cell("reason", String(obj(answer.error).message || "").slice(0, 240), attempts ? " (" + attempts + ")" : ""));
  }
  const old = answer.cached || answer.stale, total = obj(answer.timing_ms).total;
  const label = answer.label === null || answer.label === undefined ? "–" : String(answer.label).slice(0, 80);
  return el("tr", {role: "row"}, cell("time num", time), cell("model", String(answer.model).slice(0, 64)),
    cell("label", label, typeof answer.confidence === "number" ? el("span", {class: "num"}, " " + (100 * answer.confidence).toFixed(1) + " %") : null),
    cell("from", tier(answer.stale ? "fallback" : answer.cached ? "cache" : answer.tier),
      old ? el("span", {class: "quiet"}, " from ", tier(answer.origin_tier)) : null),
    cell("took right num" + (answer.deadline_met === false ? " late" : ""), ms(total), answer.deadline_met === false ? " late" : ""),
    cell("age num", old ? span(answer.age_s) : "", old ? " " : "", answer.stale ? el("span", {class: "flag"}, answer.same_input === false ? "other input" : "stale") : null),
    cell("reason", ...why(arr(answer.reasons))));
}
function why(reasons) {
  const others = reasons.slice(0, -1).join("; ").slice(0, 240);
  return [String(reasons.at(-1) || "").slice(0, 240), others ? el("small", {class: "quiet"}, " — " + others) : null];
}
function answers(list) {
  list = arr(list).slice(0, ROWS);
  at("none").hidden = list.length > 0;
  at("table").hidden = list.length === 0;
  fill(at("rows"), list.map(row));
}
function parts(list) {
  fill(at("parts"), arr(list).slice(0, 40).map(obj).flatMap(part => [el("dt", {}, String(part.name)),
    el("dd", {}, el("span", {class: "state " + (part.state === "up" ? "up" : part.state === "down" ? "off" : "half")}, (part.state === "up" ? "● " : part.state === "down" ? "✕ " : "◐ ") + words(part.state)),
      el("span", {class: "quiet"}, part.since_s !== undefined ? " for " + span(part.since_s) : "", part.reason ? ": " + String(part.reason).slice(0, 160) : ""))]));
}
const AMOUNTS = {usd: usd, bytes: size, requests: whole};
function budgets(list) {
  return arr(list).slice(0, 40).map(obj).map(budget => {
    const amount = AMOUNTS[budget.unit] || plain, left = num(budget.left), now = num(budget.left_now);
    return [amount(num(budget.limit)) + (budget.unit === "requests" ? " requests" : "") + " per " + words(budget.window) + (budget.lane ? ", " + budget.lane : ""),
      amount(left) + (now < left ? ", " + amount(now) + " at once" : "")];
  });
}
const SHARES = ["cpu", "own_cpu", "memory", "accelerator"];
function load(values) {
  const known = SHARES.filter(key => typeof values[key] === "number"), rest = Object.fromEntries(Object.entries(values).filter(([key]) => !known.includes(key)));
  return [...known.map(key => [key, Math.round(100 * values[key]) + " %"]), ...pairs(rest)];
}
function show(status, recent) {
  const ready = Boolean(status.ready), badge = at("ready"), counters = obj(status.counters);
  badge.className = "ready " + (ready ? "yes" : "no");
  say(badge, ready ? "● Ready" : "✕ Not ready");
  say(at("gateway"), String(status.gateway || "edge-agent"));
  document.title = (ready ? "" : "✕ ") + (status.gateway || "edge-agent");
  say(at("sub"), "edge-agent " + (status.version || "") + ", up for " + span(status.uptime_s));
  at("reason").hidden = ready || !status.reason;
  say(at("reason"), String(status.reason || ""));
  figures(counters, performance.now());
  const [shares, total] = where(counters);
  path(status, shares, total);
  answers(recent);
  parts(status.components);
  fill(at("budgets"), named(budgets(status.budgets)));
  fill(at("load"), terms(load(obj(status.load))));
  fill(at("doors"), terms(pairs(status.doors)));
  for (const id of ["parts", "budgets", "load", "doors"]) at(id).closest("section").hidden = !at(id).hasChildNodes();
}

/* --- asking --- */
let lostSince = null, timer = null, asking = false;
function lost(error) {
  if (!lostSince) lostSince = new Date();
  document.body.classList.add("lost");
  const badge = at("ready");
  badge.className = "ready unknown";
  say(badge, "? Unknown");
  at("reason").hidden = true;
  const banner = at("banner"), text = "The daemon has not answered since " + clock(lostSince) + ".";
  if (banner.firstChild === null || banner.firstChild.textContent !== text)
    fill(banner, [el("span", {}, text), el("small", {}, "What is below was true then. Asking again every second (" + String(error.message || error).slice(0, 80) + ").")]);
  banner.hidden = false;
  before = null;
}
function found() {
  lostSince = null;
  document.body.classList.remove("lost");
  at("banner").hidden = true;
  fill(at("banner"), []);
}
class Refused extends Error {}
async function get(path) {
  const stop = new AbortController(), limit = setTimeout(() => stop.abort(), PATIENCE_MS), token = sessionStorage.getItem("token");
  try {
    const headers = token ? {Authorization: "Bearer " + token} : {};
    const response = await fetch(path, {signal: stop.signal, cache: "no-store", headers});
    if (response.status === 401 || response.status === 403) throw new Refused(token ? "This token is not valid here, or lacks the role read." : "");
    if (!response.ok) throw new Error(path + ": " + response.status);
    return await response.json();
  } finally { clearTimeout(limit); }
}
function enter(text) {
  sessionStorage.removeItem("token");
  found();
  document.body.classList.add("lost");
  const badge = at("ready");
  badge.className = "ready unknown";
  say(badge, "? Locked");
  if (text) say(at("why"), text);
  at("enter").hidden = false;
}
at("enter").addEventListener("submit", event => {
  event.preventDefault();
  sessionStorage.setItem("token", at("token").value.trim());
  at("token").value = "";
  at("enter").hidden = true;
  ask();
});
async function ask() {
  if (asking || document.hidden || !at("enter").hidden) return;
  asking = true;
  clearTimeout(timer);
  try {
    const [status, recent] = await Promise.all([get("/status"), get("/recent")]);
    found();
    show(obj(status), recent);
  } catch (error) {
    if (error instanceof Refused) enter(error.message);
    else lost(error);
  }
  asking = false;
  timer = setTimeout(ask, EVERY_MS);
}
document.addEventListener("visibilitychange", ask);
ask();
