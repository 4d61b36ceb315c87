//! Compiles the messages of etcd's API with a protobuf compiler written in Rust, so that no `protoc` is needed. The calls
//! themselves are a few lines each, in `directory/etcd/client.rs`: no code is generated for them.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let files = protox::compile(["etcd.proto"], ["proto"])?;
    prost_build::Config::new()
        .bytes(["."])
        // They hold secrets.
        .skip_debug([".etcdserverpb.AuthenticateRequest", ".etcdserverpb.AuthenticateResponse"])
        .compile_fds(files)?;
    Ok(())
}
