"""The web page: a Gradio app in which a person uploads an image, types class names and gets segments."""
