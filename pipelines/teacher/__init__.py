"""The demo's teacher: its weights in `model/`, and the scripts that trained it. No stage of the pipeline runs them."""
