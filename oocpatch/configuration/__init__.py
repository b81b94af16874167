"""Arguments of a call checked, and the plan that is made of them."""
