'use strict';
(function () {
  const figures = JSON.parse(document.getElementById('figures-json').textContent);
  const dark = window.matchMedia('(prefers-color-scheme: dark)');
  const canvases = [...document.querySelectorAll('.canvas')];

  // On paper: black on white, whatever the screen has.
  const paper = {
    '--text': '#000', '--card': '#fff', '--grid': '#ddd', '--line': '#999',
    '--soft': '#333',
  };
  // Widths that fit A4 and Letter, in pixels: a figure, and half a row.
  const paperWidth = (canvas) => (canvas.closest('.small') ? 325 : 670);

  function colours(printed) {
    const style = getComputedStyle(document.documentElement);
    return (name) => (printed ? paper[name] : style.getPropertyValue(name).trim());
  }

  // A figure's own layout with the page's colours, and one plot below the
  // other where the page is narrow.
  function layoutOf(figure, width, printed) {
    const colour = colours(printed);
    const layout = JSON.parse(JSON.stringify(figure.layout));
    if (printed) {
      layout.width = width;
      // Lower than on a screen, so that two or three fit on a sheet.
      layout.height = Math.min(Math.round(0.75 * layout.height), 880);
    }
    layout.paper_bgcolor = 'rgba(0,0,0,0)';
    layout.plot_bgcolor = 'rgba(0,0,0,0)';
    layout.font = { color: colour('--text'), size: 12, family: 'system-ui, sans-serif' };
    layout.hoverlabel = { bgcolor: colour('--card'), font: { color: colour('--text') } };
    if (layout.meta && layout.meta.side_by_side && width < 620) {
      layout.xaxis.domain = [0, 1];
      layout.xaxis2.domain = [0, 1];
      layout.yaxis.domain = [0.6, 1];
      layout.yaxis2.domain = [0, 0.4];
      layout.height = 620;
    }
    for (const axis of ['xaxis', 'yaxis', 'xaxis2', 'yaxis2']) {
      if (layout[axis]) {
        Object.assign(layout[axis], {
          gridcolor: colour('--grid'), linecolor: colour('--line'),
          zerolinecolor: colour('--soft'), automargin: true,
        });
      }
    }
    return layout;
  }

  function draw(canvas, printed) {
    const figure = figures[canvas.dataset.figure];
    const width = printed ? paperWidth(canvas) : canvas.clientWidth;
    const layout = layoutOf(figure, width, printed);
    canvas.style.minHeight = layout.height + 'px';
    return Plotly.react(canvas, figure.data, layout, {
      responsive: true, displaylogo: false, displayModeBar: false,
      scrollZoom: false,
    });
  }

  const drawAll = () => Promise.all(canvases.map((canvas) => draw(canvas, false)));
  drawAll().then(() => { document.body.dataset.drawn = 'yes'; });
  dark.addEventListener('change', drawAll);
  let narrow = window.innerWidth < 700;
  window.addEventListener('resize', () => {
    if (narrow !== window.innerWidth < 700) {
      narrow = !narrow;
      drawAll();
    }
  });
  window.addEventListener('beforeprint', () => {
    canvases.forEach((canvas) => draw(canvas, true));
  });
  window.addEventListener('afterprint', () => drawAll().then(() => {
    // The width of paper would stay otherwise.
    canvases.forEach((canvas) => Plotly.Plots.resize(canvas));
  }));

  // Tables: a heading is a button that sorts by its column.
  const valueOf = (row, column) => {
    const text = row.cells[column].textContent.trim();
    const number = parseFloat(text.replace('−', '-'));
    return { text, number: Number.isNaN(number) ? null : number };
  };
  document.querySelectorAll('table.sortable').forEach((table) => {
    table.querySelectorAll('thead th').forEach((head, column) => {
      const button = document.createElement('button');
      button.type = 'button';
      button.textContent = head.textContent;
      head.replaceChildren(button);
      button.addEventListener('click', () => {
        const up = head.getAttribute('aria-sort') !== 'ascending';
        table.querySelectorAll('thead th').forEach((other) => other.removeAttribute('aria-sort'));
        head.setAttribute('aria-sort', up ? 'ascending' : 'descending');
        const rows = [...table.tBodies[0].rows];
        const values = new Map(rows.map((row) => [row, valueOf(row, column)]));
        const numeric = rows.every((row) => values.get(row).number !== null || values.get(row).text === '');
        rows.sort((a, b) => {
          const first = values.get(a), second = values.get(b);
          if (first.text === '' || second.text === '') {
            return (first.text === '') - (second.text === '');
          }
          const order = numeric ? first.number - second.number
            : first.text.localeCompare(second.text, 'en', { numeric: true });
          return up ? order : -order;
        });
        table.tBodies[0].append(...rows);
      });
    });
  });

  document.querySelectorAll('.copy').forEach((button) => {
    button.addEventListener('click', () => {
      const code = button.parentElement.querySelector('code');
      const done = () => { button.textContent = 'copied'; };
      const select = () => { getSelection().selectAllChildren(code); };
      if (navigator.clipboard) {
        navigator.clipboard.writeText(code.textContent).then(done, select);
      } else {
        select();
      }
    });
  });
}());
