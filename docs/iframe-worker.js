// Pages opened from a folder may start no worker. This one runs the search's script in a hidden frame instead.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.body.appendChild(Object.assign(document.createElement("iframe"), { hidden: true }));
      this.frame = frame.contentWindow;
      addEventListener("message", event => {
        if (event.source !== this.frame) return;
        const answer = new MessageEvent("message", { data: event.data });
        this.dispatchEvent(answer);
        this.onmessage?.(answer);
      });
      this.frame.postMessage = data => parent.postMessage(data, "*");
      this.frame.importScripts = (...scripts) => scripts.reduce((before, script) => before.then(() => this.load(script)), Promise.resolve());
      this.ready = this.load(url);
    }
    load(url) {
      const inside = this.frame.document;
      return new Promise(done => {
        inside.body.appendChild(Object.assign(inside.createElement("script"), { src: url, onload: done }));
      });
    }
    postMessage(data) {
      this.ready.then(() => this.frame.dispatchEvent(new MessageEvent("message", { data: structuredClone(data) })));
    }
    terminate() {
      this.frame.frameElement.remove();
    }
  };
}
