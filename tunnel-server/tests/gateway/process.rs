//! The real process, and how it ends.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    time::Instant,
};

use super::*;

/// How long the plugin hangs. It ends in the end, since nobody else would end it.
const HANGING: Duration = Duration::from_secs(30);

#[tokio::test]
async fn a_credential_plugin_that_hangs_does_not_keep_the_process() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let tunnel_server = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tunnel-server"));
        command.current_dir(folder.path()).env_clear().env("PATH", "/usr/bin:/bin").stdout(Stdio::null());
        command
    };
    assert!(tunnel_server().args(["pki", "init", "pki"]).status().unwrap().success());
    let hang = format!("echo run > runs; exec sleep {}", HANGING.as_secs());
    let kubeconfig = format!(
        "current-context: main\n\
         contexts: [{{name: main, context: {{cluster: c, user: u}}}}]\n\
         clusters: [{{name: c, cluster: {{server: 'http://192.0.2.1'}}}}]\n\
         users: [{{name: u, user: {{exec: {{apiVersion: client.authentication.k8s.io/v1, command: sh, \
         args: [-c, {hang:?}]}}}}}}]\n"
    );
    fs::write(at("kubeconfig"), kubeconfig).unwrap();
    let config = "gateway_id: gw-1\n\
         kubernetes: {kubeconfig: kubeconfig}\n\
         edges: {listen: '127.0.0.1:0', cert: pki/edge/gateway.crt, key: pki/edge/gateway.key, \
         client_ca: pki/edge/ca.crt}\n\
         ingress: {listen: none, unix: door.sock}\n\
         admin: {listen: none}\n";
    fs::write(at("gateway.yaml"), config).unwrap();
    let mut gateway = tokio::process::Command::from(tunnel_server());
    let mut gateway =
        gateway.args(["run", "-c", "gateway.yaml"]).stderr(Stdio::null()).kill_on_drop(true).spawn().unwrap();
    until_there(&at("runs")).await;

    let told = Instant::now();
    let id = gateway.id().unwrap().to_string();
    assert!(Command::new("kill").args(["-TERM", &id]).status().unwrap().success());
    let ended = timeout(HANGING / 2, gateway.wait()).await;
    assert!(ended.is_ok_and(|status| status.unwrap().success()), "still there after {:?}", told.elapsed());
}

/// A gateway that needs nothing but its own files, and answers probes.
fn prepare(folder: &Path) {
    let made = Command::new(env!("CARGO_BIN_EXE_tunnel-server"))
        .current_dir(folder)
        .args(["pki", "init", "pki"])
        .stdout(Stdio::null())
        .status();
    assert!(made.unwrap().success());
    let config = "gateway_id: gw-1\n\
         edges: {listen: '127.0.0.1:0', cert: pki/edge/gateway.crt, key: pki/edge/gateway.key, \
         client_ca: pki/edge/ca.crt, max_links: 1000}\n\
         ingress: {listen: none, unix: door.sock}\n\
         admin: {listen: '127.0.0.1:0'}\n";
    fs::write(folder.join("gateway.yaml"), config).unwrap();
}

#[tokio::test]
async fn the_limit_of_open_files_is_raised_and_its_shortage_is_named() {
    for (limits, raised, short) in [("-Sn 100; ulimit -Hn 9000", "9000", false), ("-n 600", "600", true)] {
        let folder = tempfile::tempdir().unwrap();
        prepare(folder.path());
        let program = env!("CARGO_BIN_EXE_tunnel-server");
        let mut gateway = tokio::process::Command::new("sh");
        gateway.current_dir(folder.path()).kill_on_drop(true);
        gateway.args(["-c", &format!("ulimit {limits}; exec {program} run -c gateway.yaml 2> log")]);
        let gateway = gateway.spawn().unwrap();
        until_there(&folder.path().join("door.sock")).await;
        let all = fs::read_to_string(format!("/proc/{}/limits", gateway.id().unwrap())).unwrap();
        let files = all.lines().find(|line| line.starts_with("Max open files")).unwrap();
        assert_eq!(files.split_whitespace().nth(3).unwrap(), raised);
        let log = fs::read_to_string(folder.path().join("log")).unwrap();
        let words = "(RLIMIT_NOFILE) is 600, but the settings allow for 5539: raise it to that";
        assert_eq!(log.contains(words), short, "{log}");
        assert_eq!(
            log.contains("1314 for edges.max_links, 4096 for ingress.max_connections"),
            short,
            "{log}"
        );
    }
}

async fn until_there(path: &Path) {
    let looking = async {
        while !path.exists() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, looking).await.unwrap();
}
