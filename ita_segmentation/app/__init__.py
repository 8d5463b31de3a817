"""The page: a Gradio app in which a person uploads an image, types words and gets segments."""
