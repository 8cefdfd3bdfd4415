// The browser's half of wris_lib.widgets.ClickablePicture: shows `jpeg`, sends {x, y, shift} for each click.
export default {
  render({ model, el }) {
    const image = document.createElement("img");
    image.draggable = false;
    image.style = "display: block; cursor: crosshair; max-width: 100%; max-height: 320px";
    const update = () => {
      URL.revokeObjectURL(image.src);
      image.src = URL.createObjectURL(new Blob([model.get("jpeg")], { type: "image/jpeg" }));
      image.alt = model.get("alt");
    };
    image.addEventListener("click", (event) => {
      const box = image.getBoundingClientRect();
      model.send({
        x: (event.clientX - box.left) / box.width,
        y: (event.clientY - box.top) / box.height,
        shift: event.shiftKey,
      });
    });
    update();
    model.on("change:jpeg", update);
    el.append(image);
    return () => {
      model.off("change:jpeg", update);
      URL.revokeObjectURL(image.src);
    };
  },
};
