// The slider's texts. The page gives extensions no translations of its own, only the language that the user has set.

const WORDS = {
  en: {
    before: "before",
    after: "after",
    play: "Play",
    pause: "Pause",
    frame: "Frame",
    line: "Line between before and after",
    flip: "Show before, after or both",
    previous: "Previous result",
    next: "Next result",
    cut: "The first {frames} of {total} frames",
    gone: "There is no preview any more, or this browser can't play it. Run the graph again.",
    help: "Move: the line. Wheel: zoom. Drag: pan. Double click: reset. A, B: before, after (hold or press). Space: play. ← →: frames.",
  },
  zh: {
    before: "之前",
    after: "之后",
    play: "播放",
    pause: "暂停",
    frame: "帧",
    line: "前后之间的分界线",
    flip: "显示之前、之后或两者",
    previous: "上一个结果",
    next: "下一个结果",
    cut: "{total} 帧中的前 {frames} 帧",
    gone: "预览已不存在，或此浏览器无法播放。请重新运行工作流。",
    help: "移动指针：分界线。滚轮：缩放。拖动：平移。双击：还原。A、B：之前、之后（按住或按一下）。空格：播放。← →：逐帧。",
  },
  ja: {
    before: "前",
    after: "後",
    play: "再生",
    pause: "一時停止",
    frame: "フレーム",
    line: "前と後の境界線",
    flip: "前、後、または両方を表示",
    previous: "前の結果",
    next: "次の結果",
    cut: "{total} フレームのうち最初の {frames} フレーム",
    gone: "プレビューがもうないか、このブラウザでは再生できません。もう一度実行してください。",
    help: "ポインターを動かす：境界線。ホイール：拡大。ドラッグ：移動。ダブルクリック：元に戻す。A、B：前、後（長押しまたは押す）。スペース：再生。← →：コマ送り。",
  },
};

/** The texts of a language such as "zh" or "ja-JP"; English where there are none. */
export function wordsOf(language) {
  return WORDS[String(language ?? "").toLowerCase().split(/[-_]/)[0]] ?? WORDS.en;
}
