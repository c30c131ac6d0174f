
// Requests this page again and again, and replaces what has changed; what a person has opened or is reading stays.
const INTERVAL_MS = 2000;
const state = document.createElement("div");
state.className = "live";
state.setAttribute("role", "status");
document.body.append(state);

let drawn = document.querySelector("main").cloneNode(true);
let tag = null;
let busy = false;
let since = Date.now();

function showState(connected) {
  if (connected) since = Date.now();
  state.classList.toggle("lost", !connected);
  const seconds = Math.round((Date.now() - since) / 1000);
  state.textContent = connected ? "live" : `no answer for ${seconds} s; retrying`;
}

function keepState(old, fresh) {
  const opened = [...old.querySelectorAll("details")].map((element) => element.open);
  fresh.querySelectorAll("details").forEach((element, i) => (element.open = opened[i] ?? false));
  for (const box of fresh.querySelectorAll("input[type=checkbox]")) {
    box.checked = [...old.querySelectorAll("input[type=checkbox]:checked")].some((other) => other.value === box.value);
  }
}

function sameFrame(before, after) {
  const list = (element) => [...element.attributes].map((a) => a.name + "=" + a.value).join();
  const bare = (element) => [...element.childNodes].every((node) => node.nodeType !== 3 || !node.data.trim());
  return before.tagName === after.tagName && before.tagName !== "svg" && before.children.length > 0 &&
    before.children.length === after.children.length && list(before) === list(after) && bare(before) && bare(after);
}

function patch(live, before, after) {
  if (before.isEqualNode(after)) return;
  if (sameFrame(before, after) && live.children.length === before.children.length) {
    const children = [...live.children];
    children.forEach((child, i) => patch(child, before.children[i], after.children[i]));
    return;
  }
  if (live.matches(".active") || live.querySelector(".active")) tip.style.display = "none";
  const fresh = document.importNode(after, true);
  keepState(live, fresh);
  live.replaceWith(fresh);
  if (fresh.matches("svg.chart")) attach(fresh);
  attachAll(fresh);
}

function updateAges() {
  for (const element of document.querySelectorAll("time[data-at]")) {
    const seconds = Math.max(0, Math.round(Date.now() / 1000 - Number(element.dataset.at)));
    const [size, unit] = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]].find(([s]) => seconds >= s) ?? [1, "s"];
    const text = `${Math.floor(seconds / size)} ${unit} ago`;
    if (element.textContent !== text) element.textContent = text;
  }
}

async function refresh() {
  if (busy || document.hidden) return;
  busy = true;
  try {
    const answer = await fetch(location.href, { headers: tag ? { "If-None-Match": tag } : {}, cache: "no-store" });
    if (answer.status !== 304) {
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      const next = page.querySelector("main");
      if (next === null) throw new Error("no page");
      patch(document.querySelector("main"), drawn, next);
      document.title = page.title;
      drawn = next;
      tag = answer.headers.get("etag");
    }
    showState(true);
  } catch {
    showState(false);
  } finally {
    busy = false;
    updateAges();
  }
}

showState(true);
updateAges();
setInterval(refresh, INTERVAL_MS);
document.addEventListener("visibilitychange", refresh);
refresh();
