// A click on a name or a symbol lights up all its uses: in equations, settings and code. A setting and its symbol are
// one name.
const word = /[A-Za-z_]\w*|[Α-ω]/g;
const places = ".code, .math, .eq, .three";

function wordAt(event) {
  const at = document.caretRangeFromPoint?.(event.clientX, event.clientY);
  const node = at?.startContainer;
  if (node?.nodeType !== Node.TEXT_NODE || !node.parentElement.closest("code, math, tbody th")) return null;
  const hit = m => m.index <= at.startOffset && at.startOffset <= m.index + m[0].length;
  return [...node.data.matchAll(word)].find(hit)?.[0];
}

let lit = null;
document.addEventListener("click", event => {
  const clicked = window.CSS?.highlights ? wordAt(event) : null;
  lit = clicked === lit ? null : clicked;
  const names = new Set([lit]), ranges = [];
  for (const th of document.querySelectorAll(".three tbody th")) {
    const own = th.textContent.split(" ");
    if (th.querySelector("i") && own.includes(lit)) own.forEach(name => names.add(name));
  }
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (lit && walker.nextNode()) {
    const node = walker.currentNode;
    if (!node.parentElement.closest(places)) continue;
    for (const m of node.data.matchAll(word)) {
      if (!names.has(m[0])) continue;
      const end = m.index + m[0].length;
      ranges.push(new StaticRange({startContainer: node, startOffset: m.index, endContainer: node, endOffset: end}));
    }
  }
  if (window.CSS?.highlights) CSS.highlights.set("hit", new Highlight(...ranges));
});
