"use strict";
// What makes the page quicker. All of it can be had without: see page.html.
(() => {
  const root = document.documentElement, byId = id => document.getElementById(id);
  root.classList.add("script");
  const say = text => { const s = byId("said"); if (s) s.textContent = text; };

  const fetchPage = async (url, signal) => {
    const answer = await fetch(url, {headers: {Accept: "text/html"}, signal});
    if (!answer.ok) throw new Error(answer.status);
    return new DOMParser().parseFromString(await answer.text(), "text/html");
  };

  for (const box of document.querySelectorAll(".copy")) {
    if (!navigator.clipboard) break; // plain HTTP: the text can be selected
    const b = document.createElement("button");
    b.type = "button";
    b.textContent = "Copy";
    b.onclick = async () => {
      await navigator.clipboard.writeText(box.querySelector("pre").textContent);
      b.textContent = "Copied";
      setTimeout(() => { b.textContent = "Copy"; }, 2000);
    };
    box.append(b);
  }

  // A file's path is in its row once: its button takes name and address from there.
  const addPurgeButtons = () => {
    for (const path of document.querySelectorAll("#list .path")) {
      const b = document.createElement("button");
      b.className = "purge";
      b.textContent = "Purge";
      b.setAttribute("aria-label", "Purge " + path.textContent);
      path.parentNode.insertCell().append(b);
    }
  };
  addPurgeButtons();

  const search = byId("search");
  let searching;
  if (search) search.oninput = () => {
    if (searching) searching.abort();
    const mine = searching = new AbortController();
    setTimeout(async () => {
      if (mine.signal.aborted) return;
      const url = new URL(location.href), {remote} = byId("list").dataset;
      url.search = new URLSearchParams(remote ? {remote, search: search.value} : {search: search.value});
      try {
        const found = (await fetchPage(url, mine.signal)).getElementById("list");
        byId("list").innerHTML = found.innerHTML;
        addPurgeButtons();
        history.replaceState(null, "", url);
        say(found.querySelectorAll("tbody tr").length + " shown");
      } catch (e) {
        if (e.name !== "AbortError") say("The search failed: " + e.message);
      }
    }, 150);
  };

  document.addEventListener("click", async event => {
    const b = event.target.closest(".purge");
    if (!b) return;
    let token = sessionStorage.getItem("token") || prompt("API_TOKEN, which allows purging:");
    if (!token) return;
    const row = b.closest("tr"), path = row.querySelector(".path");
    const answer = await fetch("artifacts/" + byId("list").dataset.remote + "/" + path.textContent.split("/").map(encodeURIComponent).join("/"),
      {method: "DELETE", headers: {Authorization: "Bearer " + token}});
    if (answer.ok || answer.status === 404) {
      sessionStorage.setItem("token", token);
      row.remove();
      say("Purged.");
      return;
    }
    sessionStorage.removeItem("token");
    say("Not purged: " + ((await answer.json().catch(() => ({}))).detail || answer.status));
  });

  // The parts that change are fetched again while somebody looks.
  setInterval(async () => {
    if (document.hidden) return;
    try {
      const fresh = await fetchPage(location.href);
      for (const old of document.querySelectorAll("[data-live]")) {
        const now = fresh.getElementById(old.id);
        if (now && !old.contains(document.activeElement)) old.innerHTML = now.innerHTML;
      }
    } catch { /* the next time */ }
  }, 10000);
})();
