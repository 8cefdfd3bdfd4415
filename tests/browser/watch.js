// What tests ask about the notebook that is open in JupyterLab. The page has it as `watch`.
(() => {
  const panel = jupyterapp.shell.currentWidget;
  const { kernel } = panel.sessionContext.session;
  const pending = new Set(); // ids of widgets' messages that the kernel still works on
  const times = { asked: 0, sign: 0, answered: 0 }; // ms, of the last control that was worked
  const troubles = [];

  kernel.statusChanged.connect((_, status) => {
    if (["autorestarting", "restarting", "dead"].includes(status)) {
      troubles.push(`the kernel is ${status}`);
      pending.clear(); // nobody will answer
    }
  });
  kernel.anyMessage.connect((_, { msg, direction }) => {
    if (msg.header.msg_type === "execute_reply") watch.ended++;
    if (msg.header.msg_type === "error") troubles.push(`${msg.content.ename}: ${msg.content.evalue}`);
    if (direction === "send" && msg.header.msg_type === "comm_msg") {
      pending.add(msg.header.msg_id);
      times.asked ||= performance.now();
    } else if (msg.header.msg_type === "status" && msg.content.execution_state === "idle") {
      if (pending.delete(msg.parent_header.msg_id)) times.answered = performance.now();
    }
  });

  const cells = () => panel.content.widgets;
  const area = (index) => cells()[index].outputArea.node;
  const visible = (element) => element.checkVisibility({ visibilityProperty: true });

  async function fingerprint(image) {
    const bytes = await (await fetch(image.src)).arrayBuffer();
    return String.fromCharCode(...new Uint8Array(await crypto.subtle.digest("SHA-256", bytes)));
  }

  // Red, green, blue, opacity of a CSS colour, whatever notation it is in.
  const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d");
  function rgba(color) {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  }

  // WCAG's relative luminance.
  function luminance(color) {
    const [r, g, b] = color.map((part) => (part /= 255) <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  }

  function background(element) {
    for (; element; element = element.parentElement) {
      const color = rgba(getComputedStyle(element).backgroundColor);
      if (color[3] === 255) return color;
    }
    return [255, 255, 255, 255];
  }

  const watch = {
    troubles,
    times,
    ended: 0, // cells that were run

    run() {
      this.running = true;
      jupyterapp.commands.execute("notebook:run-all-cells").finally(() => (this.running = false));
    },

    code: () =>
      cells().flatMap(({ model }, index) =>
        model.type === "code" && model.sharedModel.getSource().trim()
          ? [{ index, id: model.id, count: model.executionCount, outputs: model.outputs.toJSON() }]
          : [],
      ),

    // Scroll to a cell, and mark what came of it for the test to find.
    async show(index) {
      await panel.content.scrollToItem(index, "start");
      area(index).dataset.cell = cells()[index].model.id;
    },

    // Nothing that a control has asked for is under way.
    settled: () => pending.size === 0 && kernel.status !== "busy",

    // Forget the last control, and note when one of this cell shows that it is at work.
    listen(index) {
      Object.assign(times, { asked: 0, sign: 0, answered: 0 });
      this.observer?.disconnect();
      this.observer = new MutationObserver(() => {
        if (area(index).innerText.includes("working")) times.sign ||= performance.now();
      });
      this.observer.observe(area(index), { subtree: true, childList: true, characterData: true });
    },

    // All that can be seen to change: pictures by their content.
    pictures: (index) => Promise.all([...area(index).querySelectorAll("img")].filter(visible).map(fingerprint)),

    // What is written in its fields.
    fields: (index) => [...area(index).querySelectorAll(".widget-text input")].map((field) => field.value),

    // Pixels that one would have to scroll sideways to see all of a cell, its code or what came of it.
    overflow: (index) =>
      Math.max(
        ...[cells()[index].node, ...cells()[index].node.querySelectorAll("*")]
          .filter((element) => ["auto", "scroll"].includes(getComputedStyle(element).overflowX))
          .map((element) => element.scrollWidth - element.clientWidth),
        0,
      ),

    // Texts of a cell's widgets, with the contrast of each to what is behind it.
    texts(index) {
      const walker = document.createTreeWalker(area(index), NodeFilter.SHOW_TEXT);
      const found = [];
      while (walker.nextNode()) {
        const element = walker.currentNode.parentElement;
        const text = walker.currentNode.data.trim();
        if (!text || !visible(element) || !element.closest(".jupyter-widgets") || element.closest(":disabled")) continue;
        const lights = [rgba(getComputedStyle(element).color), background(element)].map(luminance);
        found.push([text, (Math.max(...lights) + 0.05) / (Math.min(...lights) + 0.05)]);
      }
      return found;
    },

    theme: (name) => jupyterapp.commands.execute("apputils:change-theme", { theme: name }),
    close: () => panel.sessionContext.shutdown(),
  };
  return watch;
})()
