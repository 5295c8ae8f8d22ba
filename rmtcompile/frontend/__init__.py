"""The front end: any callable on tensors -> one flat graph, with a source line at each node."""
