"""How the page looks: one column on a phone, diagrams side by side where there is room."""

STYLE = """
:root{color-scheme:light}
*{box-sizing:border-box}
body{margin:0;background:#f6f8fa;color:#1f2328;font:16px/1.5 system-ui,sans-serif}
main{max-width:1240px;margin:0 auto;padding:12px}
h1{font-size:24px;margin:8px 4px;overflow-wrap:anywhere}
h2{font-size:20px;margin:0 0 10px}
h3{font-size:16px;margin:16px 0 6px}
p{margin:4px 0;overflow-wrap:anywhere}
section,.verdict{background:#fff;border:1px solid #d0d7de;border-radius:8px;padding:14px;margin:12px 0}
.verdict{border-left:8px solid #9a6700}
.verdict b{font-size:20px}
.verdict b::first-letter{text-transform:uppercase}
.healthy{border-left-color:#1a7f37}
.healthy b{color:#1a7f37}
.sick{border-left-color:#cf222e}
.sick b{color:#cf222e}
.unfinished b,.doubtful b{color:#9a6700}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(340px,100%),1fr));gap:18px 16px}
figure{margin:0;min-width:0}
figcaption{font-weight:600;font-size:15px}
svg{display:block;width:100%;height:auto}
.legend{display:flex;flex-wrap:wrap;gap:0 12px;font-size:13px;color:#59636e}
.legend i{display:inline-block;width:10px;height:10px;border-radius:2px;margin-right:5px}
.tick{font:12px system-ui,sans-serif;fill:#59636e}
.name{font:12px system-ui,sans-serif;fill:#1f2328}
.grid{stroke:#d8dee4;stroke-width:1}
.line{fill:none;stroke-width:1.8;stroke-linejoin:round}
.mark path{stroke:#bf8700;stroke-width:1;stroke-dasharray:2 3}
.mark text{font:bold 11px system-ui,sans-serif;fill:#9a6700}
.events{list-style:none;margin:0 0 12px;padding:0;font-size:14px}
.events b{color:#9a6700;margin-right:4px}
.wide{overflow-x:auto}
.wide img{display:block;max-width:none}
.strips{display:flex;gap:8px;overflow-x:auto}
.strips figcaption{font-weight:400;font-size:13px;color:#59636e;white-space:nowrap}
.strips figure{flex:none}
table{border-collapse:collapse;font-size:14px}
td,th{text-align:left;vertical-align:top;padding:4px 12px 4px 0;border-bottom:1px solid #eaeef2}
td{overflow-wrap:anywhere;min-width:90px}
summary{cursor:pointer;font-weight:600}
"""
