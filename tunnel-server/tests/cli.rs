//! The real binary, as a person meets it: what it prints, what it refuses, what it leaves on disk.

// Clippy's exception for tests does not reach the helpers of an integration test.
#![allow(clippy::unwrap_used)]

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Command, Output},
};

const CONFIG: &str = "\
gateway_id: gw-1
edges:
  cert: pki/edge/gateway.crt
  key: pki/edge/gateway.key
  client_ca: pki/edge/ca.crt
ingress:
  cert: pki/control-plane/gateway.crt
  key: pki/control-plane/gateway.key
  client_ca: pki/control-plane/ca.crt
";

fn tunnel_server(directory: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_tunnel-server"))
        .args(arguments)
        .current_dir(directory)
        .env_clear()
        .output()
        .unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// A directory with a PKI and a configuration file.
fn prepared(config: &str) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let made = tunnel_server(directory.path(), &["pki", "init", "pki", "--dns", "gw.example"]);
    assert!(made.status.success(), "{}", text(&made.stderr));
    fs::write(directory.path().join("gateway.yaml"), config).unwrap();
    directory
}

#[test]
fn a_good_configuration_is_summed_up() {
    let directory = prepared(CONFIG);
    let output = tunnel_server(
        directory.path(),
        &["check-config", "--config", "gateway.yaml", "--drain-timeout", "2m"],
    );
    let summary = text(&output.stdout);
    assert!(output.status.success() && output.stderr.is_empty(), "{summary}{}", text(&output.stderr));
    for expected in [
        "be gateway       gw-1",
        "0.0.0.0:8443 (10000 links, 4 a node)",
        "drain for        2m",
        "buffer at most",
    ] {
        assert!(summary.contains(expected), "no {expected:?} in\n{summary}");
    }
}

#[test]
fn every_mistake_is_named_with_its_place() {
    let config = CONFIG.replace("client_ca: pki/edge", "clientca: pki/edge") + "link: {max_streams: many}\n";
    let directory = prepared(&config);
    for command in ["check-config", "run"] {
        let output =
            tunnel_server(directory.path(), &[command, "-c", "gateway.yaml", "--admin-listen", "8132"]);
        assert_eq!(output.status.code(), Some(1));
        let expected = "\
gateway.yaml:5:3: edges.clientca: unknown key; did you mean edges.client_ca?
gateway.yaml:10:21: link.max_streams: \"many\" is not a whole number
--admin-listen: \"8132\" is not an IP address and port, such as 127.0.0.1:8131, or none
edges.client_ca: is not set: the CA that the edges' certificates come from (--edges-client-ca PATH, \
TUNNEL_SERVER_EDGES_CLIENT_CA, or edges.client_ca in the file)
4 problems";
        let problems = text(&output.stderr);
        assert!(problems.starts_with(expected), "{problems}");
    }
}

#[test]
fn credentials_are_read_by_check_config() {
    let directory = prepared(&CONFIG.replace("pki/edge/gateway.key", "pki/peer/gateway.key"));
    fs::remove_file(directory.path().join("pki/control-plane/ca.crt")).unwrap();
    let output = tunnel_server(directory.path(), &["check-config", "--config", "gateway.yaml"]);
    assert_eq!(output.status.code(), Some(1));
    let problems = text(&output.stderr);
    let lines: Vec<&str> = problems.lines().collect();
    assert!(
        lines[0].starts_with("edges: pki/edge/gateway.crt and pki/peer/gateway.key cannot be used: "),
        "{problems}"
    );
    assert!(lines[1].starts_with("ingress: cannot read pki/control-plane/ca.crt: "), "{problems}");
    assert_eq!(lines[2..], ["2 problems"]);
}

#[test]
fn keys_are_for_their_owner_alone() {
    let directory = prepared(CONFIG);
    let mode = |path: &str| fs::metadata(directory.path().join(path)).unwrap().permissions().mode() & 0o777;
    for side in ["edge", "control-plane", "peer"] {
        assert_eq!(mode(&format!("pki/{side}")), 0o700);
        for key in ["ca.key", "gateway.key"] {
            assert_eq!(mode(&format!("pki/{side}/{key}")), 0o600, "{side}/{key}");
        }
    }
    assert_eq!(mode("pki"), 0o700);
    assert_eq!(mode("pki/control-plane/client.key"), 0o600);
}

#[test]
fn nothing_is_overwritten() {
    let directory = prepared(CONFIG);
    let at = |path: &str| directory.path().join(path);
    let kept = fs::read(at("pki/peer/ca.key")).unwrap();
    fs::remove_dir_all(at("pki/edge")).unwrap();
    let output = tunnel_server(directory.path(), &["pki", "init", "pki"]);
    assert_eq!(output.status.code(), Some(1));
    let error = text(&output.stderr);
    assert!(error.starts_with("nothing was written, because these are there already"), "{error}");
    assert!(error.contains("\n  pki/peer/ca.key"), "{error}");
    assert_eq!(fs::read(at("pki/peer/ca.key")).unwrap(), kept);
    assert!(!at("pki/edge").exists(), "a file was written before all were checked");
}

#[test]
fn issued_certificates_verify_under_their_own_ca_only() {
    let directory = prepared(CONFIG);
    for (arguments, file, ca) in [
        (vec!["edge", "edge-a"], "edge-a", "edge"),
        (vec!["gateway", "gw-2", "--domain", "edge"], "gw-2", "edge"),
        (vec!["client", "system:prometheus"], "system:prometheus", "control-plane"),
        (vec!["peer", "gw-3"], "gw-3", "peer"),
    ] {
        let all = [vec!["pki", "issue"], arguments, vec!["--dir", "pki", "--out", "new"]].concat();
        let output = tunnel_server(directory.path(), &all);
        assert!(output.status.success(), "{}", text(&output.stderr));
        assert_eq!(text(&output.stdout), format!("new/{file}.crt\nnew/{file}.key\n"));
        for side in ["edge", "control-plane", "peer"] {
            let verified = Command::new("openssl")
                .args(["verify", "-CAfile", &format!("pki/{side}/ca.crt"), &format!("new/{file}.crt")])
                .current_dir(directory.path())
                .output()
                .expect("the tests need the openssl command");
            assert_eq!(verified.status.success(), side == ca, "{file} under {side}");
        }
        let again = tunnel_server(directory.path(), &all);
        assert!(text(&again.stderr).starts_with("nothing was written"), "{}", text(&again.stderr));
    }
}

#[test]
fn names_that_are_no_file_names_are_refused() {
    let directory = prepared(CONFIG);
    for name in ["../evil", "", ".hidden", "a/b"] {
        let output = tunnel_server(directory.path(), &["pki", "issue", "client", name, "--dir", "pki"]);
        assert_eq!(output.status.code(), Some(2), "{name:?} was accepted");
    }
}

#[test]
fn help_is_complete() {
    let directory = tempfile::tempdir().unwrap();
    let help = text(&tunnel_server(directory.path(), &["run", "--help"]).stdout);
    for expected in
        ["Examples:", "--edges-listen <ADDR:PORT>", "[default: 0.0.0.0:8443]", "Documentation:", "--grants"]
    {
        assert!(help.contains(expected), "no {expected:?} in\n{help}");
    }
}
