"""The engine on a Milvus server, for collections that outgrow a machine."""
