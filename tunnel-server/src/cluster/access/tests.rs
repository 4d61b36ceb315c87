//! Tests of credentials that stay away.

use std::{fs, io::Write, process::Command};

use super::*;

/// The plugin notes each time that it hangs, which it does until someone writes an answer into its pipe. A client needs
/// more than one answer: kube asks for the certificate and for the token.
#[tokio::test(start_paused = true)]
async fn a_credential_plugin_that_hangs_is_given_up_and_not_run_again() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let (pipe, runs, file) = (at("pipe"), at("runs"), at("kubeconfig"));
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let script = format!(
        "cd {}; test -e answer || {{ echo run >> runs; timeout 60 cat pipe > part; mv part answer; }}; cat answer",
        folder.path().display()
    );
    let config = format!(
        "current-context: main\n\
         contexts: [{{name: main, context: {{cluster: c, user: u}}}}]\n\
         clusters: [{{name: c, cluster: {{server: 'http://192.0.2.1'}}}}]\n\
         users: [{{name: u, user: {{exec: {{apiVersion: client.authentication.k8s.io/v1, command: sh, \
         args: [-c, {script:?}]}}}}}}]\n"
    );
    fs::write(&file, config).unwrap();
    let mut clients = Clients::new(Access::Kubeconfig(file));
    for _ in 0..2 {
        // Time is not moved on by itself while blocking work runs, so wait for the run, then move it.
        let late = async {
            while !runs.exists() {
                tokio::task::yield_now().await;
            }
            tokio::time::advance(LOAD_TIMEOUT).await;
        };
        let (client, ()) = tokio::join!(biased; clients.next(), late);
        let error = client.err().unwrap().to_string();
        assert_eq!(error, "the credential plugin \"sh\" has not answered in 30s");
    }
    assert_eq!(clients.server().unwrap(), "http://192.0.2.1/");
    let answer =
        r#"{"kind":"ExecCredential","apiVersion":"client.authentication.k8s.io/v1","status":{"token":"t"}}"#;
    fs::OpenOptions::new().write(true).open(&pipe).unwrap().write_all(answer.as_bytes()).unwrap();
    clients.next().await.unwrap();
    assert_eq!(fs::read_to_string(&runs).unwrap(), "run\n");
}
