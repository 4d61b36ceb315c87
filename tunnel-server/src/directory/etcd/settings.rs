//! What a gateway can be told about etcd.

use std::{path::PathBuf, time::Duration};

use tunnel_edge::{
    daemon::settings::{List, Parse, Problems, Value, not_expected},
    settings_group,
};

use super::{Endpoint, EtcdConfig, EtcdTls};

/// How long a member of etcd may take to answer, at most.
const CALL_TIMEOUT: Duration = Duration::from_secs(3);
const SECOND: Duration = Duration::from_secs(1);

settings_group! {
    /// Etcd (where gateways find one another and the nodes they hold)
    pub struct EtcdSettings in "etcd" {
        /// Addresses of etcd's members, such as https://etcd-0.example:2379. Any of them will do; when one fails, the next
        /// is used. If not set, there is no directory in etcd. While all are away, what is known of other gateways stays,
        /// and links to this one are served.
        endpoints: List<Endpoint>,
        /// PEM file with the CA certificates that etcd's certificates must come from. Needed for https.
        ca: Option<PathBuf>,
        /// PEM file with the certificate that etcd sees, followed by its intermediates, if etcd wants one. This and the
        /// other files are read again for each new connection.
        cert: Option<PathBuf>,
        /// PEM file with the certificate's private key.
        key: Option<PathBuf>,
        /// User to log in as, if etcd has users. Needs a role that may read and write keys that begin with etcd.prefix.
        username: Option<UserName>,
        /// File with the user's password.
        password_file: Option<PathBuf>,
        /// What all keys begin with. The gateways of one cluster share it; another cluster needs another.
        prefix: Prefix = "/edge-tunnel/",
        /// How soon a gateway that was killed is forgotten. One that ends in order is forgotten at once.
        lease: Duration = "10s",
    }
}

/// A user's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UserName(String);

impl Parse for UserName {
    const PLACEHOLDER: &'static str = "NAME";
    const EXPECTED: &'static str = "a user's name";

    fn parse(text: &str) -> Result<Self, String> {
        if text.is_empty() { Err(not_expected::<Self>(text)) } else { Ok(Self(text.to_owned())) }
    }
}

/// What keys begin with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prefix(String);

impl Parse for Prefix {
    const PLACEHOLDER: &'static str = "PREFIX";
    const EXPECTED: &'static str =
        "a prefix of 2 to 200 characters that ends with a slash, such as /edge-tunnel/";

    fn parse(text: &str) -> Result<Self, String> {
        let good = text.ends_with('/') && (2..=200).contains(&text.len());
        if good { Ok(Self(text.to_owned())) } else { Err(not_expected::<Self>(text)) }
    }
}

impl Parse for Endpoint {
    const PLACEHOLDER: &'static str = "URL";
    const EXPECTED: &'static str = "an address of etcd, such as https://etcd-0.example:2379";

    fn parse(text: &str) -> Result<Self, String> {
        text.parse()
    }
}

impl EtcdSettings {
    /// What was set; `None` if no endpoint was. What is wrong with it is noted.
    pub(crate) fn config(&self, problems: &mut Problems) -> Option<EtcdConfig> {
        let duration = |value: &Duration| humantime::format_duration(*value);
        problems.within(&self.lease, &(2 * SECOND..=3600 * SECOND), duration);
        let endpoints: Vec<Endpoint> = self.endpoints.iter().map(|(endpoint, _)| endpoint.clone()).collect();
        if endpoints.is_empty() {
            return None;
        }
        let identity = both(
            problems,
            (&self.cert, "the certificate that belongs to etcd.key"),
            (&self.key, "the private key that belongs to etcd.cert"),
        );
        let ca = match identity {
            Some(_) => problems.require(&self.ca, "the CA that etcd's certificates come from"),
            None => self.ca.value.clone(),
        };
        let user = both(
            problems,
            (&self.username, "the user whose password etcd.password_file holds"),
            (&self.password_file, "the file with the password of etcd.username"),
        );
        Some(EtcdConfig {
            endpoints,
            tls: ca.map(|ca| EtcdTls { ca, identity }),
            user: user.map(|(UserName(name), file)| (name, file)),
            prefix: self.prefix.value.0.clone(),
            lease: *self.lease,
            // A member that hangs must leave time to renew the lease with another.
            timeout: CALL_TIMEOUT.min(*self.lease / 2),
        })
    }
}

/// Two settings that go together, with why each is needed if the other is set.
fn both<A: Clone, B: Clone>(
    problems: &mut Problems,
    (one, why_one): (&Value<Option<A>>, &str),
    (other, why_other): (&Value<Option<B>>, &str),
) -> Option<(A, B)> {
    if one.is_none() && other.is_none() {
        return None;
    }
    problems.require(one, why_one).zip(problems.require(other, why_other))
}
