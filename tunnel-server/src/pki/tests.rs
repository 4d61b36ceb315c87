//! Tests of the certificates, with OpenSSL as the second opinion.

use std::{fs, path::Path, process::Command};

use tunnel_core::identity::{names_in_certificate, node_from_certificate};
use x509_parser::{
    extensions::ParsedExtension,
    pem::{Pem, parse_x509_pem},
};

use super::*;

const DAY: Duration = Duration::from_secs(24 * 3600);

fn authority(domain: Domain) -> Authority {
    Authority::new(domain, Validity::lasting(DAY)).unwrap()
}

fn edge() -> Profile {
    Profile::Edge { node: "edge-a".parse().unwrap() }
}

fn gateway() -> Profile {
    let names = vec![AltName::Dns("gw.example".to_owned()), AltName::Ip([127, 0, 0, 1].into())];
    Profile::Gateway { name: "gw".parse().unwrap(), names }
}

fn client() -> Profile {
    Profile::Client { name: "kube-apiserver".to_owned() }
}

fn peer() -> Profile {
    Profile::Peer { name: "gw".parse().unwrap(), names: Vec::new() }
}

fn pem(issued: &Issued) -> Pem {
    parse_x509_pem(issued.cert_pem.as_bytes()).unwrap().1
}

#[test]
fn an_edge_certificate_names_its_node() {
    let issued = authority(Domain::Edge).issue(&edge(), Validity::lasting(DAY)).unwrap();
    assert_eq!(node_from_certificate(&pem(&issued).contents).unwrap().as_str(), "edge-a");
}

#[test]
fn a_peer_certificate_has_the_gateways_id_among_its_names() {
    let issued = authority(Domain::Peer).issue(&peer(), Validity::lasting(DAY)).unwrap();
    assert_eq!(names_in_certificate(&pem(&issued).contents), ["gw", "gw"]);
}

#[test]
fn no_ca_issues_for_another_side() {
    let allowed =
        |domain, profile: &Profile| authority(domain).issue(profile, Validity::lasting(DAY)).is_ok();
    for domain in [Domain::Edge, Domain::ControlPlane, Domain::Peer] {
        assert_eq!(allowed(domain, &edge()), domain == Domain::Edge);
        assert_eq!(allowed(domain, &gateway()), domain != Domain::Peer);
        assert_eq!(allowed(domain, &client()), domain == Domain::ControlPlane);
        assert_eq!(allowed(domain, &peer()), domain == Domain::Peer);
    }
}

#[test]
fn validity_is_backdated_and_arbitrary() {
    let authority = authority(Domain::Edge);
    let issued = pem(&authority.issue(&edge(), Validity::lasting(DAY)).unwrap());
    let validity = issued.parse_x509().unwrap().validity().clone();
    let lasts = validity.not_after.timestamp() - validity.not_before.timestamp();
    assert!((24 * 3600 + 299..=24 * 3600 + 301).contains(&lasts), "{lasts}");
    assert!(validity.is_valid());
    let now = SystemTime::now();
    let expired = authority.issue(&edge(), Validity::between(now - 2 * DAY, now - DAY)).unwrap();
    assert!(!pem(&expired).parse_x509().unwrap().validity().is_valid());
}

#[test]
fn serial_numbers_are_long_positive_and_never_the_same() {
    let authority = authority(Domain::Edge);
    let serial = || {
        let issued = pem(&authority.issue(&edge(), Validity::lasting(DAY)).unwrap());
        issued.parse_x509().unwrap().raw_serial().to_vec()
    };
    let (one, other) = (serial(), serial());
    assert_ne!(one, other);
    assert!(one.len() == 16 && one[0] & 0x80 == 0, "{one:?}");
}

#[test]
fn a_saved_ca_goes_on_issuing() {
    let first = authority(Domain::Edge);
    let again = Authority::from_pem(Domain::Edge, first.cert_pem(), &first.key_pem()).unwrap();
    let issued = pem(&again.issue(&edge(), Validity::lasting(DAY)).unwrap());
    let (_, ca) = parse_x509_pem(first.cert_pem().as_bytes()).unwrap();
    let ca = ca.parse_x509().unwrap();
    issued.parse_x509().unwrap().verify_signature(Some(ca.public_key())).unwrap();
}

#[test]
fn what_is_no_ca_is_told_apart() {
    let (first, second) = (authority(Domain::Edge), authority(Domain::Edge));
    let leaf = first.issue(&edge(), Validity::lasting(DAY)).unwrap();
    let error = |cert: &str, key: &str| match Authority::from_pem(Domain::Edge, cert, key) {
        Ok(_) => String::new(),
        Err(error) => error.to_string(),
    };
    assert!(error(first.cert_pem(), &second.key_pem()).contains("belongs to another certificate"));
    assert!(error(&leaf.cert_pem, &leaf.key_pem).contains("no CA's"));
    assert!(error("", &first.key_pem()).starts_with("not a CA to issue with: "));
    assert!(error(first.cert_pem(), "").starts_with("not a CA to issue with: "));
}

#[test]
fn ca_certificates_say_what_they_may_do() {
    let authority = authority(Domain::Peer);
    let (_, pem) = parse_x509_pem(authority.cert_pem().as_bytes()).unwrap();
    let certificate = pem.parse_x509().unwrap();
    let constraints = certificate.basic_constraints().unwrap().unwrap();
    assert!(constraints.critical && constraints.value.ca);
    assert_eq!(constraints.value.path_len_constraint, Some(0));
    let usage = certificate.key_usage().unwrap().unwrap();
    assert!(usage.critical && usage.value.key_cert_sign() && !usage.value.digital_signature());
    let has_key_id =
        |extension: &ParsedExtension<'_>| matches!(extension, ParsedExtension::SubjectKeyIdentifier(_));
    assert!(certificate.extensions().iter().any(|extension| has_key_id(extension.parsed_extension())));
}

/// Runs `openssl` in `directory`; its output, and whether it agreed.
fn openssl(directory: &Path, arguments: &[&str]) -> (bool, String) {
    let output = Command::new("openssl")
        .args(arguments)
        .current_dir(directory)
        .output()
        .expect("the tests need the openssl command");
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    (output.status.success(), text.into_owned())
}

#[test]
fn openssl_agrees_on_every_profile() {
    for (domain, profile, purposes, shows) in [
        (Domain::Edge, edge(), ["sslclient", ""], "TLS Web Client Authentication"),
        (Domain::Edge, gateway(), ["sslserver", ""], "DNS:gw.example, IP Address:127.0.0.1"),
        (Domain::ControlPlane, gateway(), ["sslserver", ""], "TLS Web Server Authentication"),
        (Domain::ControlPlane, client(), ["sslclient", ""], "CN = kube-apiserver"),
        (
            Domain::Peer,
            peer(),
            ["sslclient", "sslserver"],
            "TLS Web Server Authentication, TLS Web Client Authentication",
        ),
    ] {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let authority = authority(domain);
        let issued = authority.issue(&profile, Validity::lasting(DAY)).unwrap();
        fs::write(at("ca.crt"), authority.cert_pem()).unwrap();
        fs::write(at("a.crt"), &issued.cert_pem).unwrap();
        fs::write(at("a.key"), &issued.key_pem).unwrap();
        for purpose in ["sslclient", "sslserver"] {
            let verify = ["verify", "-x509_strict", "-purpose", purpose, "-CAfile", "ca.crt", "a.crt"];
            let (agreed, text) = openssl(directory.path(), &verify);
            assert_eq!(agreed, purposes.contains(&purpose), "{profile:?} as {purpose}: {text}");
        }
        let (_, text) = openssl(directory.path(), &["x509", "-in", "a.crt", "-noout", "-text"]);
        let common =
            ["Subject Key Identifier", "Authority Key Identifier", "CA:FALSE", "NIST CURVE: P-256", shows];
        for expected in common {
            assert!(text.contains(expected), "{profile:?}: no {expected} in {text}");
        }
        let public = |arguments: &[&str]| openssl(directory.path(), arguments).1;
        assert_eq!(
            public(&["x509", "-in", "a.crt", "-noout", "-pubkey"]),
            public(&["pkey", "-in", "a.key", "-pubout"])
        );
    }
}
