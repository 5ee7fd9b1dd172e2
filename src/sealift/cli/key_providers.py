"""`sealift key-provider`: where the keys of encrypted VMs live."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import click

from sealift.cli import export_file, passphrases, provider_wish, quantities
from sealift.cli.credentials import connect
from sealift.cli.output import Output, json_option, pass_output
from sealift.errors import InvalidInput, KeyProviderError, SealiftError

if TYPE_CHECKING:
    from sealift.api.encryption import KeyProvider, KeyProviderAdded
    from sealift.secret import Secret

STATES = {
    "ok": "ok",
    "degraded": "DEGRADED",
    "unreachable": "UNREACHABLE",
    "not_exported": "NOT EXPORTED",
    "no_certificate": "NO CERTIFICATE",
}
_NEXT = {
    "not_exported": "Export it first: `sealift key-provider export {name} --output FILE`",
    "no_certificate": "Have its request signed, then run `sealift key-provider certificate {name} FILE`",
}

_TEXT = click.File("r", encoding="utf-8")


@click.group("key-provider")
def key_provider() -> None:
    """Key providers: add, list, show, test, default, certificate, export, import, remove."""


@key_provider.command()
@click.argument("name")
@click.option("--kind", required=True, type=click.Choice(["native", "kmip"]), help="Built in, or a KMIP key server.")
@click.option("--server", "servers", multiple=True, metavar="HOST:PORT", help="kmip: a server of it; may be repeated.")
@click.option("--authority", type=_TEXT, metavar="FILE", help="kmip: the servers' authority, or a server's own (PEM).")
@click.option(
    "--client",
    type=click.Choice(["generated", "csr", "uploaded"]),
    help="kmip: how the servers know us: by a certificate made here (the default), a request signed elsewhere, or"
    " certificate and key that you give.",
)
@click.option("--client-certificate", type=_TEXT, metavar="FILE", help="The certificate for --client uploaded (PEM).")
@click.option("--client-key", type=_TEXT, metavar="FILE", help="Its private key (PEM).")
@click.option("--default", is_flag=True, help="Use it for VMs when none is named.")
@json_option
@pass_output
def add(
    output: Output,
    name: str,
    kind: str,
    servers: tuple[str, ...],
    authority: TextIO | None,
    client: str | None,
    client_certificate: TextIO | None,
    client_key: TextIO | None,
    default: bool,
) -> None:
    """Add a key provider. Its name is for ever: VMs find their keys by it."""
    kmip_only = {
        "--server": servers,
        "--authority": authority,
        "--client": client,
        "--client-certificate": client_certificate,
        "--client-key": client_key,
    }
    given = [option for option, value in kmip_only.items() if value]
    if kind == "native" and given:
        raise InvalidInput(f"{' and '.join(given)}: only for --kind kmip", todo="leave it out")
    if kind == "kmip":
        provider_wish.check_kmip(servers, authority, client, client_certificate, client_key)
    how = client or "generated"
    wanted = provider_wish.wish(name, kind, servers, authority, how, client_certificate, client_key, default)
    with connect() as connected:
        made = connected.add_key_provider(wanted)
    _tell_added(output, made, install=client != "uploaded")


def _tell_added(output: Output, made: KeyProviderAdded, *, install: bool) -> None:
    """``install``: a certificate is one of ours, which the servers do not know yet."""
    if output.json:
        output.document(made)
        return
    found = made.provider
    output.say(f"Key provider {found.name} ({found.kind}) is added" + (", and the default." if found.default else "."))
    for note in found.notes:
        output.say(f"  {note}")
    if found.vms:
        output.say(f"VMs refer to that name: {', '.join(found.vms)}.")
    if made.unlocks:
        vms = ", ".join(made.unlocks)
        output.say(f"Locked are: {vms}. They unlock by themselves once their keys are found there.")
    if found.certificate_request:
        output.block(found.certificate_request)
        output.say("Have the servers' authority sign this request for a client, then hand in the certificate:")
        output.say(f"  sealift key-provider certificate {found.name} FILE")
    elif found.client_certificate and install:
        output.block(found.client_certificate)
        output.say("Install this certificate at each server, for a client who may make, read, find and destroy keys.")
        output.say(f"Then see that it works: `sealift key-provider test {found.name}`")
    elif found.state == "not_exported":
        output.say("It must be exported before the first VM may use it:")
        output.say(f"  sealift key-provider export {found.name} --output FILE")
    else:
        output.say(f"See that it works: `sealift key-provider test {found.name}`")


@key_provider.command("list")
@json_option
@pass_output
def list_providers(output: Output) -> None:
    """List all key providers, as they are just now."""
    with connect() as client:
        found = client.key_providers()
    if output.json:
        output.document(found)
    elif not found:
        output.say("There is no key provider yet; `sealift key-provider add NAME --kind native` adds one.")
    else:
        titles = ("NAME", "KIND", "STATE", "DEFAULT", "SERVERS", "VMS", "MESSAGE")
        output.table(titles, (_row(one) for one in found))


def _row(one: KeyProvider) -> tuple[str, ...]:
    answering = f"{sum(member.ok for member in one.members)} of {len(one.members)}" if one.kind == "kmip" else ""
    default = "yes" if one.default else ""
    return one.name, one.kind, STATES[one.state], default, answering, str(len(one.vms)), one.message


@key_provider.command()
@click.argument("name")
@json_option
@pass_output
def show(output: Output, name: str) -> None:
    """Show one key provider, its servers, and the VMs whose keys it has."""
    with connect() as client:
        found = client.key_provider(name)
    if output.json:
        output.document(found)
        return
    pairs = [
        ("name", found.name),
        ("kind", found.kind),
        ("state", STATES[found.state]),
        ("message", found.message),
        ("default", "yes" if found.default else "no"),
        ("added", quantities.moment(found.created_at)),
    ]
    if found.kind == "native":
        pairs.append(("exported", quantities.moment(found.exported_at) if found.exported_at else "NEVER"))
    else:
        pairs += [(f"server {one.address}", "ok" if one.ok else f"NOT OK: {one.message}") for one in found.members]
    pairs.append(("VMs", ", ".join(found.vms) or "none"))
    pairs += [("note", note) for note in found.notes]
    output.record(pairs)
    if found.client_certificate:
        output.say("Our certificate:")
        output.block(found.client_certificate)
    if found.certificate_request:
        output.say(
            f"Our request for one; `sealift key-provider certificate {found.name} FILE` takes what is signed for it:"
        )
        output.block(found.certificate_request)


@key_provider.command()
@click.argument("name")
@json_option
@pass_output
def test(output: Output, name: str) -> None:
    """Make a key, activate, read, find and destroy it, on every server."""
    with connect() as client:
        found = client.test_key_provider(name)
    if output.json:
        output.document(found)
    else:
        rows = (
            (step.name, "ok" if step.ok else "FAILED", quantities.duration(step.ms / 1000), step.message)
            for step in found.steps
        )
        output.table(("STEP", "RESULT", "TOOK", "MESSAGE"), rows)
    if not found.ok:
        failed = [step for step in found.steps if not step.ok]
        which = f": {', '.join(step.name for step in failed)}" if failed else ""
        raise KeyProviderError(
            f"key provider {name} does not do all that is asked of it{which}",
            todo=f"see `sealift key-provider show {name}`, and the key server's log",
        )
    output.say(f"Key provider {name} does all that is asked of it.")


@key_provider.command("default")
@click.argument("name")
@json_option
@pass_output
def make_default(output: Output, name: str) -> None:
    """Use this key provider for VMs when none is named."""
    with connect() as client:
        found = client.make_default(name)
    if output.json:
        output.document(found)
    output.say(f"Key provider {found.name} is the default now; VMs that are encrypted already keep theirs.")
    if found.state not in ("ok", "degraded"):
        output.say(f"No VM can be given a key of it as it is: {found.message}.")
        output.say(_NEXT.get(found.state, "`sealift key-provider test {name}` says more.").format(name=found.name))


@key_provider.command()
@click.argument("name")
@click.argument("file", type=_TEXT)
@json_option
@pass_output
def certificate(output: Output, name: str, file: TextIO) -> None:
    """Hand in the certificate that was signed for the provider's request ('-': standard input)."""
    text = provider_wish.pem(file)
    with connect() as client:
        found = client.set_certificate(name, text)
    if output.json:
        output.document(found)
    output.say(f"Key provider {found.name} has its certificate; `sealift key-provider test {found.name}` tries it.")


@key_provider.command()
@click.argument("name")
@click.option("--force", is_flag=True, help="Also while VMs have their keys there: they will lock.")
@json_option
@pass_output
def remove(output: Output, name: str, force: bool) -> None:
    """Forget a key provider. A native one is gone with it, unless you have its export.

    With --force VMs that have their keys there lock when the agent of their host is restarted: until then the host has
    their keys in memory. Those that run go on.
    """
    with connect() as client:
        found = client.remove_key_provider(name, force=force)
    if output.json:
        output.document(found)
        return
    output.say(f"Key provider {found.name} is removed.")
    if found.lost:
        output.say(f"{found.lost}.")
    if found.was_default:
        output.say("There is no default key provider now; `sealift key-provider default NAME` makes one of another.")
    if found.locks:
        output.say(f"The keys of these VMs cannot be fetched any more: {', '.join(found.locks)}.")
        output.say("They lock when the agent of their host is restarted, which has their keys in memory until then;")
        output.say("those that run go on. Once a provider with their keys is back under that name, they unlock again.")


@key_provider.command()
@click.argument("name")
@click.option("--output", "path", required=True, type=click.Path(path_type=Path), metavar="FILE", help="A new file.")
@click.option(
    "--passphrase",
    metavar=passphrases.METAVAR,
    help="Where your own is, of 16 characters or more; without it eight words are drawn and shown.",
)
@json_option
@pass_output
def export(output: Output, name: str, path: Path, passphrase: str | None) -> None:
    """Export a native key provider into a new file, sealed under a passphrase.

    It counts as exported only once the file was read back from the disk and opened, and if so the command exits with 0.
    Words that were drawn are printed before that, with --json too: no export counts whose words nobody could see.
    """
    export_file.check_free(path)
    chosen = passphrases.read(passphrase, again=True) if passphrase is not None else None
    with connect() as client:
        made = client.export_key_provider(name, chosen)
        export_file.write(path, made.file)
        # Shown, and flushed, before it counts: else it could count with nobody able to open it.
        try:
            _show_words(output, name, path, made.passphrase)
        except BaseException:
            path.unlink()
            click.echo(f"sealift: what opens {path} could not be shown, so it is no export, and was removed", err=True)
            raise
        try:
            client.confirm_export(name, export_file.read_back(path), chosen or _secret(made.passphrase))
        except SealiftError as error:
            raise type(error)(
                f"{path} is written, but it was not confirmed that it can be opened: {error.what}",
                todo=f"if `sealift key-provider show {name}` does not say exported, remove {path} and export it again",
            ) from error
        except BaseException:
            click.echo(
                f"sealift: {path} counts as an export only if `sealift key-provider show {name}` says exported",
                err=True,
            )
            raise
    output.say(f"Key provider {name} is exported: {path} was read back from the disk and could be opened.")
    output.say("Keep the file where the loss of this controller does not reach it.")


def _show_words(output: Output, name: str, path: Path, words: str) -> None:
    if output.json:
        output.values(provider=name, file=str(path), passphrase=words)
    elif words:
        click.echo(words)
        output.say(f"These words open {path}. They are shown once and kept nowhere: write them down, apart from it.")


def _secret(text: str) -> Secret:
    from sealift.secret import Secret

    raw = text.encode()
    return Secret(raw, length=len(raw))


@key_provider.command("import")
@click.argument("path", type=click.Path(path_type=Path), metavar="FILE")
@click.option(
    "--passphrase",
    default=passphrases.PROMPT,
    metavar=passphrases.METAVAR,
    help="Where the passphrase is: '-' standard input, '@FILE' a file; without it you are asked.",
)
@click.option("--default", is_flag=True, help="Use it for VMs when none is named.")
@json_option
@pass_output
def import_provider(output: Output, path: Path, passphrase: str, default: bool) -> None:
    """Add a native key provider from its export, under the name it had."""
    text = export_file.read_back(path)
    secret = passphrases.read(passphrase, again=False)
    with connect() as client:
        made = client.import_key_provider(text, secret, default=default)
    _tell_added(output, made, install=True)
