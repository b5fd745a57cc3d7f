"""Style sheet and script of the pages of scores; the first part of the style is that of the data report."""

from data_pipelines import report_style

STYLE = (
    report_style.STYLE
    + """
:root{--truth:#00875f;--vae:#c9820a;--floor:#8b93a1;--c4:#8b4fb8;--c5:#b8456b;--c6:#1d8fa6}
@media (prefers-color-scheme:dark){:root{--truth:#35c795;--vae:#e0ac4c;--floor:#7c8494;--c4:#b98ae0;--c5:#e57f9f;
--c6:#55c3d8}}
[hidden]{display:none!important}h2 code{font-weight:400;color:var(--ink-2);margin-left:8px;letter-spacing:0}
section{scroll-margin-top:64px}section.part{content-visibility:auto;contain-intrinsic-size:auto 1400px}
.about{margin:-6px 0 14px;color:var(--ink-2);max-width:900px}
.controls{position:sticky;top:0;z-index:5;display:flex;flex-wrap:wrap;gap:8px 10px;align-items:center;
margin:0 -24px 18px;
padding:9px 24px;background:var(--bg);border-bottom:1px solid var(--line)}
.controls select{max-width:230px;padding:5px 8px}.controls .frames{display:flex;gap:9px;align-items:center;
flex:1 1 260px}
.controls input[type=range]{flex:1;width:auto;min-width:80px;max-width:420px;padding:0;border:0;
accent-color:var(--accent)}
.controls output{color:var(--ink-2);font-size:13px;font-variant-numeric:tabular-nums;min-width:58px}
button{font:inherit;font-size:14px;color:inherit;background:var(--card);border:1px solid var(--line);border-radius:8px;
padding:5px 12px;cursor:pointer}button:hover{border-color:var(--accent)}
:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
.tiles.heads{grid-template-columns:repeat(auto-fill,minmax(250px,1fr))}
a.tile{display:block;color:inherit;text-decoration:none}a.tile:hover{border-color:var(--accent)}
.tile .label b{display:block;color:var(--ink);font-size:13.5px;font-weight:600;line-height:1.35;min-height:2.7em}
.value i{font-size:15px;font-style:normal;font-weight:500;letter-spacing:0}
.value small{font-size:13px;font-weight:400;letter-spacing:0;color:var(--ink-2);margin-left:8px;display:inline-block;
white-space:nowrap}
.gauge{position:relative;height:8px;margin:7px 0 8px;border-radius:4px;background:var(--well)}
.gauge *{position:absolute;top:0;bottom:0}.gauge b{background:var(--accent);opacity:.34;border-radius:4px;min-width:2px}
.gauge i{width:2px;margin-left:-1px;top:-2px;bottom:-2px}.gauge u{width:8px;height:8px;margin-left:-4px;
border-radius:50%;
background:var(--accent)}
table.scores{width:auto;min-width:min(100%,640px)}table.scores td{vertical-align:top;padding-top:8px;padding-bottom:8px}
table.scores :is(td,th):first-child{position:sticky;left:0;background:var(--card);padding-right:22px;white-space:nowrap}
table.scores .n{padding-left:14px}.scores b{font-weight:600;font-size:14.5px}.scores .me{font-weight:600}
tr:has(.me) td,tr:has(.me) td:first-child{background:color-mix(in srgb,var(--accent) 9%,var(--card))}
.scores small{display:block;color:var(--ink-2);font-size:12px;line-height:1.35}.scores .none{padding:0;text-align:right}
.scores i.dot{display:inline-block;width:9px;height:9px;border-radius:3px;margin-right:8px}
.plots{margin-top:20px}.plots:empty{display:none}figure.wide{grid-column:1/-1}
.columns{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(330px,100%),1fr));gap:4px 26px}
.keys{display:flex;flex-wrap:wrap;gap:2px 16px;margin:2px 0 6px;
font-size:12.5px;color:var(--ink-2)}.keys svg,figure .keys svg{width:auto;display:inline-block;margin-right:6px;
vertical-align:-1px}
.chart text{font-size:11.5px;fill:var(--ink-2);text-anchor:middle}.chart .name{fill:var(--ink);text-anchor:start;
font-size:12px;font-weight:500}.chart .note{text-anchor:end;font-variant-numeric:tabular-nums}
.chart .start{text-anchor:start}.chart .end{text-anchor:end}
.chart .grid{stroke:var(--line);stroke-width:1;fill:none}.chart .axis{stroke:var(--ink-2);stroke-width:1;fill:none}
.chart .whisker{stroke:var(--ink);stroke-width:1.2;fill:none;opacity:.75}
.gallery h3{margin:26px 0 2px}.gallery .remark{margin:0 0 12px}
.cases{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(352px,100%),1fr));gap:14px}
.cases.wide{grid-template-columns:repeat(auto-fill,minmax(min(524px,100%),1fr))}
.few>:nth-child(n+7){display:none}.more{margin-top:14px}
.case{border:1px solid var(--line);border-radius:10px;padding:11px 12px 10px;min-width:0;content-visibility:auto;
contain-intrinsic-size:auto 330px}
.pair{display:flex;gap:8px}.clip{min-width:0;flex:0 1 auto}
.clip figcaption{font-size:12px;font-weight:500;color:var(--ink-2);margin-bottom:3px;white-space:nowrap;overflow:hidden;
text-overflow:ellipsis}
.stage{position:relative;max-width:100%;background-color:var(--well);background-repeat:no-repeat;
background-size:calc(var(--c)*100%) calc(var(--r)*100%);image-rendering:pixelated;
box-shadow:0 0 0 1px var(--line);overflow:hidden}
.stage.right{box-shadow:0 0 0 2px var(--good)}.stage.wrong{box-shadow:0 0 0 2px var(--bad)}
.clip .marks{position:absolute;inset:0;width:100%;height:100%}
.marks circle{fill:none;stroke:#ff2d1a;filter:drop-shadow(0 0 .01px #fff)}
.marks text{font-weight:700;font-family:system-ui,sans-serif!important;fill:#ff2d1a;stroke:#fff;paint-order:stroke;
stroke-linejoin:round}
.time{position:relative;height:4px;border-radius:2px;background:var(--well);margin:9px 0 3px}
.time b{position:absolute;top:-2px;width:3px;height:8px;margin-left:-1px;border-radius:2px;background:var(--ink)}
.time i{position:absolute;top:0;height:4px;width:5px;margin-left:-2px;background:var(--bad)}
.at{font-size:11.5px;color:var(--ink-2);font-variant-numeric:tabular-nums}
.caption{margin:5px 0 7px;font-size:13.5px;line-height:1.4;overflow-wrap:anywhere}
.chips{list-style:none;margin:0 0 6px;padding:0;display:flex;flex-wrap:wrap;gap:5px;font-size:12.5px;align-items:center}
.chips em{font-style:normal;color:var(--ink-2);font-weight:600}.chips li{overflow-wrap:anywhere}
.chips .bad,.chips .good{padding:1px 8px;border-radius:20px;border:1px solid currentColor}
.chips .bad{color:var(--bad)}.chips .good{color:var(--good)}
.chips button{font-size:12.5px;padding:1px 9px;border-radius:20px}.chips small{color:var(--ink-2)}
.case .facts{color:var(--ink-2);font-size:11.5px;overflow-wrap:anywhere}
.better{color:var(--good);font-weight:600}.worse{color:var(--bad);font-weight:600}.same{color:var(--ink-2)}
.counts{margin-top:16px}.counts .about{margin:0 0 4px;font-size:13.5px}.value .better,.value .worse{font-weight:600}
@media (max-width:640px){header,main{padding:0 12px}section{padding:16px 12px}.controls{margin:0 -12px 14px;
padding:7px 12px;
gap:6px}.controls select{flex:1 1 40%;min-width:0;max-width:none}.controls label{flex:1 1 40%;min-width:0;display:flex}
h1{font-size:23px}.plots{grid-template-columns:minmax(0,1fr)}.tiles.heads{grid-template-columns:1fr}
.tile .label b{min-height:0}table.scores :is(td,th):first-child{white-space:normal;max-width:104px;padding-right:10px}}
@media print{.controls,.more{display:none}
.few>:nth-child(n+7){display:block}section.part{content-visibility:visible}}
"""
)

SCRIPT = """
'use strict';
const all = (where, what) => [...where.querySelectorAll(what)];
const calm = matchMedia('(prefers-reduced-motion: reduce)').matches;
const cases = all(document, '.case').map(el => ({
  el, n: +el.dataset.n, fps: +el.dataset.fps, start: +el.dataset.start, has: el.dataset.has.split(' '),
  stages: all(el, '.stage').map(s => ({el: s, n: +s.dataset.n, c: +s.dataset.c, r: +s.dataset.r})),
  marks: all(el, '.marks g'), head: el.querySelector('.time b'), at: el.querySelector('.at span'),
}));
const of = new Map(cases.map(item => [item.el, item]));
const controls = document.querySelector('.controls');

function show(item, frame) {
  frame = Math.min(frame, item.n - 1);
  for (const s of item.stages) {
    const f = Math.min(frame, s.n - 1), x = f % s.c, y = Math.floor(f / s.c);
    s.el.style.backgroundPosition = `${100 * x / Math.max(s.c - 1, 1)}% ${100 * y / Math.max(s.r - 1, 1)}%`;
  }
  for (const mark of item.marks) mark.toggleAttribute('hidden', +mark.dataset.frame !== frame);
  item.head.style.left = `${100 * frame / Math.max(item.n - 1, 1)}%`;
  item.at.textContent = frame;
}

if (controls && cases.length) {
  const [play, slider, out] = ['button', 'input', 'output'].map(tag => controls.querySelector(tag));
  let common = null, running = false, before = 0, alone = null;  // common: frame of all; null: each at its own start
  const place = item => show(item, common === null ? item.start : common);
  const galleries = all(document, '.gallery').map(el => [el, all(el, '.case').map(card => of.get(card))]);
  const near = el => {
    const box = el.getBoundingClientRect();
    return box.height > 0 && box.bottom > -200 && box.top < innerHeight + 200;
  };
  const seen = () => galleries.flatMap(([el, items]) => near(el) ? items.filter(item => near(item.el)) : []);
  const refresh = items => items.forEach(item => { if (item !== alone) place(item); });
  function set(frame, items = seen()) {
    common = frame; slider.value = Math.floor(frame); out.value = `frame ${Math.floor(frame)}`; refresh(items);
  }
  function run(on) {
    running = on; before = 0; play.textContent = on ? 'Pause' : 'Play all'; play.setAttribute('aria-pressed', on);
    if (on) requestAnimationFrame(tick);
  }
  let clock = 0;
  function tick(now) {
    if (!running) return;
    if (before) clock += (now - before) / 1000;
    before = now;
    const items = seen(), frame = Math.floor(clock * (items[0] || cases[0]).fps);
    if (frame > Math.max(...items.map(item => item.n), 1) + 2) clock = 0;
    if (frame !== common) set(Math.min(frame, +slider.max), items);
    requestAnimationFrame(tick);
  }
  play.addEventListener('click', () => {
    const lead = seen()[0] || cases[0];
    clock = common === null || common >= lead.n - 1 ? 0 : common / lead.fps;
    run(!running);
  });
  slider.addEventListener('input', () => { run(false); set(+slider.value); });
  const eye = new IntersectionObserver(entries => entries.forEach(entry => {
    const item = of.get(entry.target);
    if (entry.isIntersecting && item !== alone) place(item);
  }), {rootMargin: '100px'});
  cases.forEach(item => eye.observe(item.el));
  for (const item of cases) {
    all(item.el, '.chips button').forEach(button => button.addEventListener('click', () => {
      run(false); set(+button.dataset.frame);
    }));
    const pair = item.el.querySelector('.pair');
    let timer = 0;
    pair.addEventListener('pointerenter', () => {
      if (running || calm) return;
      let frame = 0;
      alone = item;
      timer = setInterval(() => {
        if (running) { clearInterval(timer); alone = null; return; }
        show(item, frame); frame = (frame + 1) % (item.n + 3);
      }, 1000 / item.fps);
    });
    pair.addEventListener('pointerleave', () => {
      clearInterval(timer);
      if (alone === item) { alone = null; place(item); }
    });
  }
}

for (const gallery of all(document, '.gallery')) {
  const list = gallery.querySelector('.cases'), more = gallery.querySelector('.more');
  if (!more) continue;
  list.classList.add('few'); more.hidden = false;
  more.addEventListener('click', () => {
    const few = list.classList.toggle('few');
    more.textContent = few ? more.dataset.more : 'Show fewer';
  });
}

if (controls) {
  controls.hidden = false;
  const [part, check] = ['part', 'check'].map(name => controls.querySelector(`[name=${name}]`));
  const filter = () => {
    for (const el of all(document, 'section.part')) el.hidden = part.value && part.value !== el.id;
    if (!check) return;
    const wanted = check.value;
    for (const item of cases) item.el.hidden = wanted !== '' && !item.has.includes(wanted);
    for (const gallery of all(document, '.gallery')) {
      const list = gallery.querySelector('.cases'), more = gallery.querySelector('.more');
      const left = [...list.children].filter(el => !el.hidden).length;
      if (more) {
        more.hidden = wanted !== '';
        list.classList.toggle('few', wanted === '' && more.textContent !== 'Show fewer');
      }
      gallery.querySelector('.found').textContent = wanted === '' ? '' : ` ${left} of these match.`;
    }
  };
  [part, check].forEach(select => select && select.addEventListener('change', filter));
  part.addEventListener('change', () => part.value && document.getElementById(part.value).scrollIntoView());
}
"""
