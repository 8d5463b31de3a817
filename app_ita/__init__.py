"""The page: a Gradio app in which a person uploads a picture, types words and gets segments."""
