"""Style sheet and script of the page of a data report."""

STYLE = """
:root{--bg:#f6f7f9;--card:#fff;--ink:#16181d;--ink-2:#545b67;--line:#e1e4ea;--accent:#2f6fde;--files:#8b93a1;--bad:#c93a2b;
--warn:#b7791f;--good:#2f8f5b;--well:#eceef2;--shade:0 1px 2px rgb(16 24 40/.06)}
@media (prefers-color-scheme:dark){:root{--bg:#0f1115;--card:#181b21;--ink:#e8eaee;--ink-2:#a2a9b6;--line:#2a2f38;
--accent:#6ea0ff;--files:#8b93a1;--bad:#ff7a6b;--warn:#e0ac4c;--good:#5cc48c;--well:#0b0d10;--shade:none}}
*{box-sizing:border-box}html{scroll-behavior:smooth}
body{margin:0;background:var(--bg);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif}
header,main{max-width:1240px;margin:0 auto;padding:0 24px}
header{padding-top:36px}h1{font-size:28px;line-height:1.2;margin:2px 0 6px;overflow-wrap:anywhere;letter-spacing:-.01em}
h2{font-size:20px;margin:0 0 14px;letter-spacing:-.01em}h3{font-size:15px;margin:22px 0 8px}
.over{margin:0;color:var(--accent);font-size:12px;font-weight:600;letter-spacing:.08em;text-transform:uppercase}
.sub{margin:0;color:var(--ink-2)}code{font:12.5px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
nav{display:flex;flex-wrap:wrap;gap:6px 18px;margin:18px 0 0;padding:12px 0;border-top:1px solid var(--line)}
nav a{color:var(--ink-2);text-decoration:none;font-size:14px}nav a:hover{color:var(--accent)}
section{background:var(--card);border:1px solid var(--line);border-radius:12px;
padding:22px 24px;margin:0 0 18px;box-shadow:var(--shade)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(170px,1fr));gap:12px;margin:0 0 18px}
.tile{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:14px 16px;box-shadow:var(--shade)}
.label,.hint{color:var(--ink-2);font-size:12.5px}.value{font-size:25px;font-weight:600;letter-spacing:-.02em;
font-variant-numeric:tabular-nums;line-height:1.35}
.warnings{list-style:none;margin:0 0 18px;padding:0;display:grid;gap:8px}
.warnings li{display:grid;grid-template-columns:76px 1fr;gap:12px;background:var(--card);border:1px solid var(--line);
border-left:4px solid var(--tone);border-radius:8px;padding:9px 14px;box-shadow:var(--shade)}
.warnings b{color:var(--tone);font-size:13px;line-height:22px}
.problem{--tone:var(--bad)}.warning{--tone:var(--warn)}.note{--tone:var(--files)}.fine{--tone:var(--good)}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:14px}
th{font-weight:500;color:var(--ink-2);font-size:12.5px;text-align:left;vertical-align:bottom}
th,td{padding:6px 14px 6px 0;border-bottom:1px solid var(--line)}th:last-child,td:last-child{padding-right:0}
.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}table.narrow{max-width:560px}
table.facts{max-width:820px}.facts thead{display:none}.facts td:first-child{color:var(--ink-2);width:230px}
.facts td{overflow-wrap:anywhere}.facts+.scroll,.scroll+.scroll{margin-top:18px}
tbody tr:last-child td{border-bottom:0}.groups th{text-align:right;border:0;color:var(--ink);padding-bottom:0}
.bar{display:flex;gap:2px;height:14px;border-radius:7px;overflow:hidden;background:var(--well)}.bar div{min-width:3px}
.unchanged{background:var(--good)}.changed{background:var(--accent)}.gone{background:var(--bad)}
.legend{display:flex;flex-wrap:wrap;gap:4px 22px;margin:10px 0 14px;font-size:13.5px;color:var(--ink-2)}
.legend b{color:var(--ink)}.legend i{display:inline-block;width:10px;height:10px;border-radius:3px;margin-right:7px}
.remark{color:var(--ink-2);font-size:12.5px;margin:12px 0 0;max-width:900px}
.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(330px,1fr));gap:22px 26px}
figure{margin:0}figcaption{font-size:14px;font-weight:600;margin-bottom:4px}
figcaption small{display:block;font-weight:400;color:var(--ink-2);font-size:12.5px}
figure svg{width:100%;height:auto;display:block}figure svg text{font-family:inherit!important}
details{border-bottom:1px solid var(--line);padding:7px 0}details:last-of-type{border-bottom:0}
summary{cursor:pointer;overflow-wrap:anywhere}
summary b{display:inline-block;min-width:46px;font-variant-numeric:tabular-nums}
summary span,.names span{color:var(--ink-2);font-size:13px}.names{margin:8px 0 8px;padding-left:22px;font-size:13.5px}
.names li{overflow-wrap:anywhere;margin:2px 0}.more{list-style:none;color:var(--ink-2)}
.tools{display:flex;flex-wrap:wrap;gap:10px;align-items:center;margin-bottom:14px}
.count{color:var(--ink-2);font-size:13px}
input,select{font:inherit;font-size:14px;color:inherit;
background:var(--bg);border:1px solid var(--line);border-radius:8px;
padding:6px 10px}input{width:220px}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(210px,1fr));gap:14px}
details+.cards{margin-top:18px}
.card{border:1px solid var(--line);border-radius:10px;overflow:hidden;display:flex;flex-direction:column}
.card[hidden]{display:none}
.frame{aspect-ratio:4/3;background:var(--well);display:grid;place-items:center;overflow:hidden}
.strip{background-repeat:no-repeat;background-size:calc(var(--k)*100%) 100%;background-position:0 0}
.strip:hover,.strip:focus{animation:play 2s steps(var(--k),jump-none) infinite;outline:0}
@keyframes play{from{background-position:0 0}to{background-position:100% 0}}
.none{color:var(--ink-2);font-size:13px;padding:12px;text-align:center;overflow-wrap:anywhere}
.text{padding:9px 11px 11px;min-width:0}
.key{font-size:13px;font-weight:600;white-space:nowrap;overflow:hidden;text-overflow:ellipsis}
.card .facts{color:var(--ink-2);font-size:12px}
.facts span{display:inline-block;max-width:100%;overflow-wrap:anywhere}
.tag{color:var(--bad);font-size:12px}
.card p{margin:5px 0 0;font-size:13px;line-height:1.4;overflow-wrap:anywhere;display:-webkit-box;-webkit-line-clamp:4;
-webkit-box-orient:vertical;overflow:hidden}.card:hover p{-webkit-line-clamp:12}
@media print{section{break-inside:avoid;box-shadow:none}nav,.tools{display:none}}
"""

SCRIPT = """
for (const cards of document.querySelectorAll('.cards')) {
  const name = cards.id.slice(6), pick = tag => document.querySelector(`${tag}[data-for="${name}"]`);
  const search = pick('input'), order = pick('select'), count = pick('span');
  if (!search) continue;
  const all = [...cards.children], words = all.map(card => card.textContent.toLowerCase());
  search.addEventListener('input', () => {
    const wanted = search.value.toLowerCase();
    all.forEach((card, i) => { card.hidden = !words[i].includes(wanted); });
    count.textContent = `${all.filter(card => !card.hidden).length} of ${all.length} shown`;
  });
  order.addEventListener('change', () => {
    const key = order.value;
    const sorted = key ? [...all].sort((a, b) => b.dataset[key] - a.dataset[key]) : all;
    cards.append(...sorted);
  });
}
"""
