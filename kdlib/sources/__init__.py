"""Where texts and questions come from: files, folders, the hub, what Python brings; several with weights."""
