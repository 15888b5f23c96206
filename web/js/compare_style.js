// How the slider looks; it lives in a shadow root, so that nothing of this reaches the page.

export const STYLE = `
  :host { display: block; width: 100%; height: 100%; min-height: 150px; box-sizing: border-box; }
  .slider { display: flex; flex-direction: column; width: 100%; height: 100%; min-height: inherit; box-sizing: border-box;
    border-radius: 6px; overflow: hidden; background: #17181b; color: #e6e6e6; font: 12px/1.4 system-ui, sans-serif;
    outline: none; user-select: none; -webkit-user-select: none; }
  .slider:focus-visible, .slider:focus-within { box-shadow: inset 0 0 0 1px #8ab4f8; }
  .stage { position: relative; flex: 1 1 0; min-height: 90px; overflow: hidden; cursor: col-resize; touch-action: none; }
  .stage.zoomed { cursor: grab; }
  .stage.panning { cursor: grabbing; }
  canvas { position: absolute; inset: 0; width: 100%; height: 100%; display: block; }
  .line { position: absolute; top: 0; bottom: 0; width: 24px; margin-left: -12px; outline: none; cursor: inherit; touch-action: none; }
  .line::before { content: ""; position: absolute; top: 0; bottom: 0; left: 11px; width: 2px; background: #fff;
    box-shadow: 0 0 2px #000; }
  .line:focus-visible::before { background: #8ab4f8; }
  .name { position: absolute; top: 6px; padding: 1px 6px; border-radius: 4px; background: rgb(0 0 0 / 60%);
    pointer-events: none; }
  .before { left: 6px; }
  .after { right: 6px; }
  .message { position: absolute; inset: 0; display: flex; align-items: center; justify-content: center; padding: 12px;
    text-align: center; background: #17181b; }
  .bar { display: flex; flex: none; gap: 4px; align-items: center; padding: 3px 4px; }
  button { flex: none; min-width: 24px; height: 22px; padding: 0 4px; border: 1px solid #45484f; border-radius: 4px;
    background: #2a2c31; color: inherit; font: inherit; line-height: 1; cursor: pointer; }
  button:focus-visible, input:focus-visible { outline: 1px solid #8ab4f8; outline-offset: 1px; }
  input { flex: 1 1 0; min-width: 30px; height: 16px; margin: 0; accent-color: #8ab4f8; }
  .space { flex: 1 1 0; }
  .count { flex: none; font-variant-numeric: tabular-nums; white-space: nowrap; }
  [hidden] { display: none !important; }
`;
